"""Runs on disk that no training made."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from seq2seq.data.corpus import Corpus
from seq2seq.data.tokenizer import train_tokenizer
from seq2seq.inference.checkpoint import WEIGHTS, write_config
from seq2seq.utils.run import INDEX, Run
from tests.helpers.configs import tiny_config
from tests.helpers.models import tiny_model


def empty_run(folder: Path, names: Sequence[str] = ("update-0000001",), **index: str) -> Run:
    """A run with empty checkpoints, and an index where one is given."""
    run = Run(folder)
    for name in names:
        (run.checkpoints / name).mkdir(parents=True, exist_ok=True)
        (run.checkpoints / name / "config.yaml").touch()
    if index:
        (run.checkpoints / INDEX).write_text(json.dumps(index), encoding="utf-8")
    return run


def saved_run(folder: Path, family: str, *overrides: str, seed: int = 0) -> Run:
    """A run whose best checkpoint is a tiny untrained model: its translations are arbitrary, of any length."""
    config = tiny_config(family, "data=files", "data.train=[a.en,a.de]", "tokenizer.vocabulary=60", *overrides)
    animals = itertools.permutations(["dogs", "cats", "a cow", "the birds"])
    sentences = [f"Some {a} see {b}, {c} and {d}." for a, b, c, d in animals]
    tokenizer, _ = train_tokenizer(Corpus(sentences, [line.title() for line in sentences]), config.tokenizer)
    run, checkpoint = Run(folder), folder / "checkpoints" / "update-0000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, *overrides, vocabulary=tokenizer.vocabulary, seed=seed)
    write_config(config, checkpoint / "config.yaml")
    tokenizer.save(checkpoint)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, checkpoint / WEIGHTS)
    (run.checkpoints / "index.json").write_text('{"last": "update-0000001", "best": "update-0000001"}')
    return run
