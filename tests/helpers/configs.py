"""Small configs."""

from __future__ import annotations

from functools import cache

from seq2seq.cli.main import load_config
from seq2seq.config.schema import TrainConfig

FAMILIES = ("transformer", "lstm")
TINY = {
    "transformer": ["model.width=16", "model.feed_forward=32", "model.encoder_layers=2", "model.decoder_layers=2"],
    "lstm": ["model.width=16", "model.embedding=12", "model.encoder_layers=2", "model.decoder_layers=2"],
}
STILL = ["model.dropout=0", "model.attention.dropout=0"]


@cache
def tiny_config(family: str, *overrides: str) -> TrainConfig:
    """A small config without dropout, unless the overrides say otherwise."""
    return load_config("train", f"model={family}", *TINY[family], "model.attention.heads=2", *STILL, *overrides)


@cache
def files_config() -> TrainConfig:
    """A config of a corpus in files, which need not exist."""
    return load_config("train", "data=files", "data.train=[x/a.en,x/a.de]", "data.validation=v.tsv")
