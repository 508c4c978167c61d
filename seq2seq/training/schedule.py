"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math

from seq2seq.config.schema import OptimizerConfig, settled


def lr_at(update: int, config: OptimizerConfig, updates: int, halved: int = 0) -> float:
    """Return the learning rate of an update, from 1, in a run of `updates`: linear warmup, then the schedule.

    Only `plateau` depends on more than the update: on how often validations have halved the learning rate.
    """
    warmup = settled(config.warmup)
    if update <= warmup:
        return config.lr * update / warmup
    remaining = max(0.0, (updates - update) / max(1, updates - warmup))
    factors = {
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(1, warmup) / update),  # Vaswani et al. 2017, §5.3
        "linear": remaining,
        "cosine": (1 + math.cos(math.pi * (1 - remaining))) / 2,
        "stable": min(1.0, (updates - update) / max(1.0, config.cooldown * updates)),  # Hu et al. 2024, §4
        "plateau": 0.5**halved,
    }
    return config.lr * max(0.0, factors[config.schedule])
