"""The files of a checkpoint's folder: config, tokenizer and weights in safetensors, of which a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seq2seq.config import loading as configs
from seq2seq.config.schema import TrainConfig
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.errors import UserError, reason_of
from seq2seq.utils.io import write_atomically

WEIGHTS, AVERAGED = "model.safetensors", "averaged.safetensors"
CONFIG, TRAINING = "config.yaml", "training.pt"
GROUPS = ("model", "data", "tokenizer", "optimizer", "training", "search")  # of every stored config


def load_checkpoint(folder: Path) -> tuple[TrainConfig, Tokenizer, Seq2Seq]:
    """Load config, tokenizer and model (averaged weights if present); the stored config rebuilds the model."""
    config = read_config(folder / CONFIG)
    tokenizer = Tokenizer.load(folder)
    model = build_model(config.model, tokenizer.vocabulary)
    read_weights(model, inference_weights(folder))
    return config, tokenizer, model


def inference_weights(folder: Path) -> Path:
    return folder / AVERAGED if (folder / AVERAGED).exists() else folder / WEIGHTS


def count_parameters(folder: Path) -> int:
    """Count the parameters of a checkpoint's model, in which tied tables are stored once."""
    with safe_open(folder / WEIGHTS, "pt") as weights:
        names = weights.keys()
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    path.touch()  # safetensors alone would make a file that only its owner may read
    permissions = path.stat().st_mode
    save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)
    path.chmod(permissions)


@torch.no_grad()
def read_weights(model: nn.Module, path: Path, part_like: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
    """Read a model's weights; `part_like` returns what a sharded parameter needs of a whole one."""
    try:
        stored, parameters = load_file(path), dict(model.named_parameters())
        if stored.keys() != parameters.keys():
            raise RuntimeError(f"parameters differ from the config's model: {min(stored.keys() ^ parameters.keys())}")
        for name, parameter in parameters.items():
            parameter.copy_(part_like(stored[name], parameter) if part_like else stored[name])
    except (OSError, SafetensorError, RuntimeError) as error:
        raise damaged_error(path, error) from None


def write_config(config: TrainConfig, path: Path) -> None:
    write_atomically(path, to_yaml(config))


def to_yaml(config: TrainConfig) -> str:
    return str(yaml.safe_dump(configs.to_dict(config), sort_keys=False, allow_unicode=True))


def read_plain_config(path: Path) -> dict[str, Any]:
    """Read a stored config; keys newer than it may be missing, but a group that is missing was cut off."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("it contains no keys")
        missing = [group for group in GROUPS if group not in values]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise damaged_error(path, error) from None
    if missing:
        raise damaged_error(path, ValueError(f"group {missing[0]} is missing"))
    return dict(values)


def read_config(path: Path) -> TrainConfig:
    values = read_plain_config(path)
    try:
        return configs.build_config(TrainConfig, configs.with_defaults(values))
    except UserError as error:
        raise UserError(*(f"{path}: {problem}" for problem in error.problems)) from None


def damaged_error(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or reason_of(error)
    return UserError(f"{path}: missing or damaged ({reason}); restore it, or use another checkpoint")
