"""Which validation is the best, when a run ends, and which checkpoints stay: over lists of scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Course:
    """What has happened by the end of a run's validations."""

    update: int  # of the last validation
    best_update: int = 0
    without_gain: int = 0
    halved: int = 0
    recent: tuple[int, ...] = ()  # validations to average, newest first


def course(
    scores: list[float], losses: list[float], every: int, patience: int, plateau_patience: int, recent: int
) -> Course:
    """A run with these scores at its validations; equal scores are decided by the lower loss, and a tie is no gain."""
    best: int | None = None
    halved = 0
    for i in range(len(scores)):
        better = best is None and scores[i] > float("-inf")
        if best is not None:
            better = scores[i] > scores[best] or (scores[i] == scores[best] and losses[i] < losses[best])
        if better:
            best = i
        since = i - best if best is not None else i + 1
        if since and since % plateau_patience == 0:
            halved += 1
        if (patience and since >= patience) or i == len(scores) - 1:
            newest = tuple(every * (j + 1) for j in range(i, -1, -1))[:recent]
            best_update = every * (best + 1) if best is not None else 0
            return Course(every * (i + 1), best_update, since, halved, newest)
    return Course(0)
