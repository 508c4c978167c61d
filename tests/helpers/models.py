"""Tiny models with every parameter drawn."""

from __future__ import annotations

import ctypes

import pytest
import torch

from seq2seq.config.schema import ModelConfig
from seq2seq.data.tokenizer import BEGIN, Vocabulary
from seq2seq.model import native
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from tests.helpers.configs import tiny_config

VOCABULARY = Vocabulary(40, 40, joint=True)


def tiny_model(family: str, *overrides: str, vocabulary: Vocabulary = VOCABULARY, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    config: ModelConfig = tiny_config(family, *overrides).model
    model = build_model(config, vocabulary).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zeros and ones at the start would hide a gain or a bias that is not used.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def begin(rows: int) -> torch.Tensor:
    return torch.full((rows, 1), BEGIN)


def compiled(level: str | None = None) -> ctypes.CDLL:
    """The compiled part of inference, or that for another level of instructions."""
    library, problem = native.load(level)
    if library is None:
        pytest.skip(f"compiled inference needs a C++ compiler: {problem}")
    return library
