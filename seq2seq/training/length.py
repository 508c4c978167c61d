"""The length of a run by the size of its corpus: updates, warm-up, validations and patience that are "auto"."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from seq2seq.config.schema import TrainConfig, settled
from seq2seq.data.batching import Batches

GRAMMAR_UPDATES = 1100  # of the built-in corpus, whose few rules are learned in eight epochs
EPOCHS, PAIRS = 80, 30_000  # the reference point: 80 epochs of 30,000 pairs
MIN_EPOCHS, MAX_EPOCHS, MIN_UPDATES = 3, 100, 1000


def epochs_for(pairs: int) -> float:
    """Return the epochs of a run, which fall with the square root of the corpus: of four times the pairs, half."""
    return min(MAX_EPOCHS, max(MIN_EPOCHS, EPOCHS * math.sqrt(PAIRS / pairs)))


def updates_for(pairs: int, updates_per_epoch: float) -> int:
    """Return the updates of a run, in round numbers."""
    updates = max(MIN_UPDATES, epochs_for(pairs) * updates_per_epoch)
    return int(round(updates, 1 - math.floor(math.log10(updates))))  # two digits


def interval_for(updates: int) -> int:
    """Return the updates between validations: 20 validations, fewer in a short run, up to 40 in a long one."""
    return int(min(max(250, round(updates / 20, -1)), max(2500, round(updates / 40, -1))))


def patience_for(updates: int, interval: int) -> int:
    """Return half the validations of a run, or 0, no early stopping, for fewer than ten."""
    validations = math.ceil(updates / interval)
    return 0 if validations < 10 else math.ceil(validations / 2)


def warmup_for(updates: int) -> int:
    """Return a 25th of the updates, from 200, of short runs a third, to 4,000 (as Vaswani et al. 2017)."""
    return min(4000, max(min(200, updates // 3), updates // 25))


def settle_length(config: TrainConfig, batches: Batches) -> TrainConfig:
    """Return the config with numbers for whatever is "auto" in the length of the run."""
    training = config.training

    def choose(given: int | Literal["auto"], by_rule: int) -> int:
        return by_rule if given == "auto" else given

    is_grammar = config.data.path == "toy" and config.data.train == "train"
    rule = GRAMMAR_UPDATES if is_grammar else updates_for(batches.pairs_per_epoch(), batches.updates_per_epoch())
    updates = choose(training.updates, rule)
    interval = choose(training.validate_every, interval_for(updates))
    patience = choose(training.patience, patience_for(updates, interval))
    warmup = choose(config.optimizer.warmup, warmup_for(updates))
    return replace(
        config,
        training=replace(training, updates=updates, validate_every=interval, patience=patience),
        optimizer=replace(config.optimizer, warmup=warmup),
    )


def describe_length(config: TrainConfig, batches: Batches) -> str:
    """Describe how long a run with a settled length is."""
    updates, interval = settled(config.training.updates), settled(config.training.validate_every)
    patience, validations = settled(config.training.patience), math.ceil(updates / interval)
    epochs = updates / batches.updates_per_epoch()
    return (
        f"{batches.pairs_per_epoch():,} pairs, {batches.target_tokens_per_epoch():,} target tokens per epoch; "
        f"{updates:,} updates = {epochs:,.1f} epochs, {validations:,} validation{'s' if validations > 1 else ''}"
        + (f", stopping after {patience} without improvement" if patience else "")
    )
