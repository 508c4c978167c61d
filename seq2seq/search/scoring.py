"""What a search adds up and what it ranks by; nothing here knows a model.

Shapes: B sentences, K hypotheses of each, R rows, S source positions, T target positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from seq2seq.config import SearchConfig
from seq2seq.search.constraints import Rules

NEVER = float("-inf")
Length = TypeVar("Length", float, Tensor)
WIDTH = 64  # columns of a vocabulary that `best` looks at together
ROWS = 128  # rows of logits that `leaders` looks at together


@dataclass(frozen=True)
class Specials:
    """Ids with a meaning; `banned` ones are never said."""

    begin: int
    end: int
    banned: tuple[int, ...]


@dataclass(frozen=True)
class Hypothesis:
    ids: list[int]  # without END
    log_probability: float  # of all ids and END
    score: float  # what hypotheses are ranked by
    token_log_probabilities: tuple[float, ...]  # of each id, then of END


@dataclass(frozen=True)
class Task:
    """What is asked for the sentences of a batch; lengths count END."""

    longest_B: Tensor
    shortest_B: Tensor
    source_B: Tensor  # source positions of each sentence, padding left out: what its coverage is about
    seeds: Sequence[int]  # a number for each sentence, the same in every batch, that its samples are drawn by
    rules: Rules | None = None

    def repeat(self, times: int) -> Task:
        """Every sentence so many times in a row."""
        B = len(self.longest_B)
        return (
            self if times == 1 else self.select(torch.arange(B, device=self.longest_B.device).repeat_interleave(times))
        )

    def select(self, kept_B: Tensor) -> Task:
        """The same for some of the sentences; seeds and rules go by the place in the whole batch."""
        return replace(
            self,
            longest_B=self.longest_B[kept_B],
            shortest_B=self.shortest_B[kept_B],
            source_B=self.source_B[kept_B],
        )


def length_penalty(length: Length, config: SearchConfig) -> Length:
    """What a log probability is divided by: GNMT's ((5 + n) / 6)^alpha (Wu et al. 2016, §7), or n^alpha."""
    base = (5 + length) / 6 if config.normalization == "gnmt" else length
    return base**config.length_penalty


def coverage_penalty(coverage_XS: Tensor, beta: float) -> Tensor:
    """Σ over source positions of log(min(attention they got in all, 1)), times beta (Wu et al. 2016, §7)."""
    return beta * coverage_XS.clamp(1e-9, 1.0).log().sum(-1)


def leaders(logits_RV: Tensor, count: int, length: int, task: Task, specials: Specials) -> tuple[Tensor, Tensor]:
    """The `count` likeliest next ids of each row, where there are no rules: log probabilities, and ids.

    Some rows at a time: their float logits stay in the cache, and never fill fresh memory.
    """
    rows = len(logits_RV) // len(task.longest_B)
    masks = (None if x is None else x.repeat_interleave(rows).split(ROWS) for x in ends(length, task))
    early, last = masks
    parts = []
    for i, raw_RV in enumerate(logits_RV.split(ROWS)):
        part_RV, total_R1 = allowed(raw_RV, specials, early and early[i], last and last[i])
        best_RC, ids_RC = best(part_RV, count)
        parts.append((best_RC - total_R1, ids_RC))
    if len(parts) == 1:
        return parts[0]
    log_probabilities, ids = zip(*parts, strict=True)
    return torch.cat(log_probabilities), torch.cat(ids)


def permit(
    logits_RV: Tensor, length: int, task: Task, specials: Specials, said_RT: Tensor | None, sentence_R: Tensor
) -> Tensor:
    """Log probabilities of all next ids, −∞ where lengths, specials or rules do not allow them."""
    rows = len(logits_RV) // len(task.longest_B)
    early_R, last_R = (None if x is None else x.repeat_interleave(rows) for x in ends(length, task))
    ban = None
    if task.rules is not None and said_RT is not None:
        final_R = (task.longest_B == length + 1).repeat_interleave(rows)
        ban = partial(task.rules.ban, raw_RV=logits_RV, said_RT=said_RT, sentence_R=sentence_R, final_R=final_R)
    permitted_RV, total_R1 = allowed(logits_RV, specials, early_R, last_R, ban)
    return permitted_RV.sub_(total_R1)


def ends(length: int, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Which sentences may not end yet, and which must now; None for none."""
    early_B, last_B = task.shortest_B > length, task.longest_B <= length
    return early_B if early_B.any() else None, last_B if last_B.any() else None


def allowed(
    raw_RV: Tensor,
    specials: Specials,
    early_R: Tensor | None,
    last_R: Tensor | None,
    ban: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits as floats, −∞ for what may not be said, and the log-sum-exp of all that the model gave."""
    logits_RV = raw_RV.to(torch.float32, copy=True)
    total_R1 = log_sum_exp(logits_RV)
    for id_ in specials.banned:
        logits_RV[:, id_] = NEVER
    if early_R is not None:
        logits_RV[early_R, specials.end] = NEVER
    if ban is not None:
        ban(logits_RV)
    if last_R is not None:
        # At its longest length a sentence can only end.
        end_R = logits_RV[last_R, specials.end]
        logits_RV[last_R] = NEVER
        logits_RV[last_R, specials.end] = end_R
    return logits_RV, total_R1


def log_sum_exp(x_RV: Tensor) -> Tensor:
    """Over the last dimension, which stays as one column; `exp2` takes a quarter of the time of `exp` on a CPU."""
    log2e = 1 / math.log(2)
    best_R1 = x_RV.amax(-1, keepdim=True)
    return torch.add(-log2e * best_R1, x_RV, alpha=log2e).exp2_().sum(-1, keepdim=True).log() + best_R1


def best(x_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk`, at half its time: the best numbers are in the chunks with the best maxima."""
    R, V = x_RV.shape
    whole_RV = pad(x_RV, (0, -V % WIDTH), value=NEVER) if V % WIDTH else x_RV
    x_RGW = whole_RV.view(R, -1, WIDTH)
    G = x_RGW.shape[1]
    if count >= G:
        return x_RV.topk(min(count, V))
    chunk_RC = x_RGW.amax(-1).topk(count, sorted=False).indices
    flat_RC = chunk_RC + torch.arange(0, R * G, G, device=x_RV.device)[:, None]
    few_RX = x_RGW.flatten(0, 1).index_select(0, flat_RC.flatten()).view(R, -1)
    value_RC, place_RC = few_RX.max(-1, keepdim=True) if count == 1 else few_RX.topk(count)
    found_RC = chunk_RC.gather(1, place_RC // WIDTH) * WIDTH + place_RC % WIDTH
    return value_RC, found_RC.clamp(max=V - 1)  # what was padded is found only where nothing is possible
