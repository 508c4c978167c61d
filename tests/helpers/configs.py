"""Small configs."""

from __future__ import annotations

from functools import cache, reduce

import yaml

from seq2seq.cli.main import load_config
from seq2seq.config.loading import build_config, to_dict
from seq2seq.config.schema import TrainConfig

FAMILIES = ("transformer", "lstm")
TINY = {
    "transformer": ["model.width=16", "model.feed_forward=32", "model.encoder_layers=2", "model.decoder_layers=2"],
    "lstm": ["model.width=16", "model.embedding=12", "model.encoder_layers=2", "model.decoder_layers=2"],
}
# What "auto" is on the built-in corpus, for trainers that are made without one.
SETTLED = ["training.updates=1100", "training.validate_every=250", "training.patience=0"]
SETTLED += ["optimizer.warmup=200", "optimizer.lr=1.5e-3"]
STILL = ["model.dropout=0", "model.attention.dropout=0"]


@cache
def composed(*overrides: str) -> TrainConfig:
    """A training config of the command line; Hydra takes a tenth of a second for each."""
    return load_config("train", *overrides)


def changed(config: TrainConfig, *overrides: str) -> TrainConfig:
    """A config with other values, without composing it again with Hydra."""
    values = to_dict(config)
    for override in overrides:
        key, _, value = override.partition("=")
        *groups, name = key.split(".")
        group = reduce(dict.__getitem__, groups, values)
        assert name in group, key
        group[name] = yaml.safe_load(value)
    return build_config(TrainConfig, values)


@cache
def tiny_config(family: str, *overrides: str) -> TrainConfig:
    """A small config without dropout, unless the overrides say otherwise."""
    base = (f"model={family}", *TINY[family], "model.attention.heads=2", *STILL, *SETTLED)
    if all(
        override.startswith(("model.", "training.", "tokenizer.", "optimizer.", "search.")) for override in overrides
    ):
        return changed(composed(*base), *overrides)
    return composed(*base, *overrides)


@cache
def files_config() -> TrainConfig:
    """A config of a corpus in files, which need not exist."""
    languages = ("data.source=en", "data.target=de")
    return load_config("train", "data=files", "data.train=[x/a.en,x/a.de]", "data.validation=v.tsv", *languages)
