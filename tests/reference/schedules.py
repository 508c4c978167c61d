"""Learning rates as closed formulas of the update, counted from 1."""

from __future__ import annotations

import math


def lr_at(
    schedule: str, update: int, highest: float, warmup: int, updates: int, cooldown: float = 0.2, halved: int = 0
) -> float:
    """The lr of one update: a line from zero up to the highest at the last update of the warm-up, then the schedule."""
    if warmup and update <= warmup:
        return highest * update / warmup
    if schedule == "constant":
        return highest
    if schedule == "plateau":
        return float(highest / 2**halved)
    if schedule == "inverse_sqrt":  # Vaswani et al. 2017, §5.3, with its constant chosen so that the peak is `highest`
        return float(highest * min(update**-0.5, update * max(1, warmup) ** -1.5) / max(1, warmup) ** -0.5)
    if update >= updates:
        return 0.0
    done = (update - warmup) / (updates - warmup)
    if schedule == "linear":
        return highest * (1 - done)
    if schedule == "cosine":  # Loshchilov & Hutter 2017, eq. 5, without restarts
        return highest * 0.5 * (1 + math.cos(math.pi * done))
    assert schedule == "stable"  # Hu et al. 2024, §4: constant until the last part of the run, then a line to zero
    length = max(1.0, cooldown * updates)
    begins = updates - length
    return highest if update <= begins else highest * (updates - update) / length
