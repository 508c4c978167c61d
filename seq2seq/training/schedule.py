"""The learning rate as a pure function of the update."""

from __future__ import annotations

import math
from dataclasses import replace

from seq2seq.config.schema import OptimizerConfig, TrainConfig, settled

# By optimizer, the peak learning rate at width 256 and the exponent of its decay with the width: 1 for Adam (Yang et
# al. 2022, table 3), 0 for Adafactor, whose rate is relative to each tensor already.
PEAKS = {"adamw": (1.5e-3, 1), "muon": (3e-3, 1), "schedule_free": (2.5e-3, 1), "adafactor": (5e-2, 0)}


def peak_rate(optimizer: str, width: int) -> float:
    """Return the peak learning rate of a model, with two digits."""
    rate, power = PEAKS[optimizer]
    return float(f"{rate * (256 / width) ** power:.1e}")


def settle_rate(config: TrainConfig) -> TrainConfig:
    """Return the config with a number for a learning rate that is "auto"."""
    if config.optimizer.lr != "auto":
        return config
    return replace(config, optimizer=replace(config.optimizer, lr=peak_rate(config.optimizer.name, config.model.width)))


def lr_at(update: int, config: OptimizerConfig, updates: int, halved: int = 0) -> float:
    """Return the learning rate of an update, from 1, in a run of `updates`: linear warmup, then the schedule.

    Only `plateau` depends on more than the update: on how often validations have halved the learning rate.
    """
    warmup = settled(config.warmup)
    if update <= warmup:
        return settled(config.lr) * update / warmup
    remaining = max(0.0, (updates - update) / max(1, updates - warmup))
    factors = {
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(1, warmup) / update),  # Vaswani et al. 2017, §5.3
        "linear": remaining,
        "cosine": (1 + math.cos(math.pi * (1 - remaining))) / 2,
        "stable": min(1.0, (updates - update) / max(1.0, config.cooldown * updates)),  # Hu et al. 2024, §4
        "plateau": 0.5**halved,
    }
    return settled(config.lr) * max(0.0, factors[config.schedule])
