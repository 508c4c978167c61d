"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math

from seq2seq.config import OptimizerConfig


def rate_at(update: int, config: OptimizerConfig, updates: int) -> float:
    """The rate of an update, counted from 1, in a run of `updates`: a linear rise, then the schedule."""
    if update <= config.warmup:
        return config.rate * update / config.warmup
    share_left = (updates - update) / max(1, updates - config.warmup)
    course = {
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(1, config.warmup) / update),  # Vaswani et al. 2017, §5.3
        "linear": max(0.0, share_left),
        "cosine": (1 + math.cos(math.pi * (1 - max(0.0, share_left)))) / 2,
    }
    return config.rate * course[config.schedule]
