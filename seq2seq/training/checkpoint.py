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
from safetensors.torch import load_file, save_file
from torch import nn

from seq2seq import config as configs
from seq2seq.config import TrainConfig
from seq2seq.errors import UserError
from seq2seq.model.seq2seq import Seq2Seq, build_model
from seq2seq.run import INDEX, Run
from seq2seq.text.batches import Batches
from seq2seq.text.tokenizer import Tokenizer

WEIGHTS, CONFIG, TRAINING = "model.safetensors", "config.yaml", "training.pt"


@dataclass
class Progress:
    """How far a run has come."""

    update: int = 0
    best_score: float = float("-inf")
    best_loss: float = float("inf")  # decides between equal scores
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
        # By parameter, so that tied tables are stored once, and cuDNN's packed LSTM weights each on their own.
        weights = {name: p.detach().cpu().contiguous() for name, p in self.model.named_parameters()}
        save_file(weights, folder / WEIGHTS)
        training = {
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "progress": asdict(self.progress),
            "random": {kind: module.get_rng_state() for kind, module in self.generators().items()},
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
        for kind, module in self.generators().items():
            if kind in training["random"]:
                module.set_rng_state(training["random"][kind])

    def generators(self) -> dict[str, Any]:
        """The modules whose random generators the run draws from: the CPU's, and its device's."""
        kind = next(self.model.parameters()).device.type
        return {"cpu": torch} if kind == "cpu" else {"cpu": torch, kind: getattr(torch, kind)}


class Checkpoints:
    """The checkpoints of a run: the last one and the best one are kept, an index names them."""

    def __init__(self, run: Run) -> None:
        self.run, self.folder = run, run.checkpoints

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
        if os.name == "posix":  # elsewhere a folder cannot be synced
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        index = {**self.run.index(), "last": name, **({"best": name} if best else {})}
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


@torch.no_grad()
def read_weights(model: nn.Module, folder: Path) -> None:
    try:
        stored, own = load_file(folder / WEIGHTS), dict(model.named_parameters())
        if stored.keys() != own.keys():
            raise RuntimeError(f"other parameters than the config's model: {min(stored.keys() ^ own.keys())}")
        for name, parameter in own.items():
            parameter.copy_(stored[name])
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
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return UserError(f"{path}: missing or damaged ({reason}); restore it, or use another checkpoint")


def _to_disk(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
