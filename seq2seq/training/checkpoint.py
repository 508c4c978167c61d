"""Checkpoints: folders that hold everything, written aside and renamed into place. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from seq2seq import config as configs
from seq2seq.config import TrainConfig
from seq2seq.errors import UserError
from seq2seq.model.seq2seq import Seq2Seq, build_model
from seq2seq.text.batches import Batches
from seq2seq.text.tokenizer import Tokenizer

WEIGHTS, CONFIG, TRAINING, INDEX = "model.safetensors", "config.yaml", "training.pt", "index.json"


@dataclass
class Progress:
    """How far a run has come."""

    update: int = 0
    best_score: float = float("-inf")
    best_update: int = 0
    without_gain: int = 0  # validations since the best one
    target_tokens: int = 0
    seconds: float = 0.0  # of training, validation left out


@dataclass
class RunState:
    """Everything that a run needs to continue as if it had never stopped."""

    config: TrainConfig
    tokenizer: Tokenizer
    model: Seq2Seq
    optimizer: torch.optim.Optimizer
    batches: Batches
    progress: Progress

    def write(self, folder: Path) -> None:
        write_config(self.config, folder / CONFIG)
        self.tokenizer.save(folder)
        save_model(self.model, str(folder / WEIGHTS))
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        training = {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "random": {"cpu": torch.get_rng_state(), "cuda": gpus},
        }
        torch.save(training, folder / TRAINING)

    def read(self, folder: Path) -> None:
        """Continue where the checkpoint stopped."""
        read_weights(self.model, folder)
        try:
            training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many types for a damaged file
            raise damaged(folder / TRAINING, error) from None
        # The config in force decides on rates, decay and the like, not the one that was stored.
        configured = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(training["optimizer"])
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)
        self.batches.load_state_dict(training["batches"])
        self.progress = Progress(**training["progress"])
        torch.set_rng_state(training["random"]["cpu"])
        if training["random"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(training["random"]["cuda"])


class Checkpoints:
    """The checkpoints of a run: the last one and the best one are kept, an index names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def index(self) -> dict[str, str]:
        try:
            index: dict[str, str] = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise damaged(self.folder / INDEX, error) from None
        return index

    def find(self, which: str) -> Path:
        """The folder of "last", "best", or of a path."""
        if which in ("last", "best"):
            if which not in self.index():
                raise UserError(f"{self.folder}: no checkpoint yet; the run saves one at each validation")
            return self.folder / self.index()[which]
        for folder in (Path(which), self.folder / which):
            if (folder / WEIGHTS).is_file():
                return folder
        raise UserError(f"checkpoint: {which} is no checkpoint; possible: best, last, or a folder that holds {WEIGHTS}")

    def save(self, state: RunState, best: bool) -> None:
        """A complete checkpoint appears at once, or not at all; then the index turns to it."""
        name = f"update-{state.progress.update:07d}"
        aside = self.folder / f".{name}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        state.write(aside)
        for file in aside.iterdir():
            _to_disk(file)
        shutil.rmtree(self.folder / name, ignore_errors=True)  # unfinished business of a killed run
        aside.rename(self.folder / name)
        index = {**self.index(), "last": name, **({"best": name} if best else {})}
        write_aside(self.folder / INDEX, json.dumps(index, indent=1) + "\n")
        for old in self.folder.iterdir():
            if old.is_dir() and old.name not in index.values():
                shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[TrainConfig, Tokenizer, Seq2Seq]:
    """What translating needs of a checkpoint; the model is rebuilt from its own config alone."""
    config = read_config(folder / CONFIG)
    tokenizer = Tokenizer.load(folder)
    model = build_model(config.model, tokenizer.vocabulary)
    read_weights(model, folder)
    return config, tokenizer, model


def read_weights(model: nn.Module, folder: Path) -> None:
    try:
        load_model(model, str(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise damaged(folder / WEIGHTS, error) from None


def write_config(config: TrainConfig, path: Path) -> None:
    write_aside(path, yaml.safe_dump(configs.plain(config), sort_keys=False, allow_unicode=True))


def read_plain_config(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None
    return values


def read_config(path: Path) -> TrainConfig:
    try:
        return configs.typed(TrainConfig, read_plain_config(path))
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from None


def write_aside(path: Path, text: str) -> None:
    """A file with this text, whole or not at all."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text, encoding="utf-8")
    _to_disk(aside)
    aside.replace(path)


def damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:160]
    return UserError(
        f"{path}: missing or damaged ({reason}); try another checkpoint: checkpoint=last or checkpoint=best"
    )


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
