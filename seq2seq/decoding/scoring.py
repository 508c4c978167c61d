"""Hypotheses, candidates and scores of a search, independent of the model.

Shapes: B sentences, K hypotheses of each, R rows, S source positions, T target positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.constraints import Rules
from seq2seq.model.attention import rows_of_both


@dataclass(frozen=True)
class Beams:
    """Live hypotheses, and the best finished ones so far."""

    place_B: Tensor  # sentence index × G + group
    last_BK: Tensor  # the last token
    log_probability_BK: Tensor
    done_score_BK: Tensor  # best first
    done_log_probability_BK: Tensor
    done_node_BK: Tensor  # final step × K + hypothesis index
    said_BKT: Tensor | None  # all tokens, if rules need them
    coverage_BKS: Tensor | None  # attention to each source position, if penalised

    def select(self, kept_B: Tensor) -> Beams:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[kept_B] for name, value in values.items() if value is not None})

    def join(self, other: Beams) -> Beams:
        values: dict[str, Any] = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            # Source padding counts as covered.
            values[field.name] = None if a is None else rows_of_both(a, b, float(field.name == "coverage_BKS"))
        return Beams(**values)


NEVER = float("-inf")
Length = TypeVar("Length", float, Tensor)
WIDTH = 64  # vocabulary columns per chunk in `best`
ROWS = 128  # rows of logits per chunk in `leaders`


@dataclass(frozen=True)
class Specials:
    """Ids with special meaning; `banned` ones are never generated."""

    begin: int
    end: int
    banned: tuple[int, ...]


@dataclass(frozen=True)
class Hypothesis:
    ids: list[int]  # without END
    log_probability: float  # of all ids and END
    score: float  # for ranking
    token_log_probabilities: tuple[float, ...]  # of each id, then of END


@dataclass(frozen=True)
class Task:
    """Length limits, seeds and rules of a batch; lengths include END."""

    longest_B: Tensor
    shortest_B: Tensor
    source_B: Tensor  # source positions of each sentence without padding, for its coverage
    seeds: Sequence[int]  # sampling seed of each sentence, the same in every batch
    rules: Rules | None = None

    def repeat(self, times: int) -> Task:
        """Repeat each sentence `times` times in a row."""
        B = len(self.longest_B)
        return (
            self if times == 1 else self.select(torch.arange(B, device=self.longest_B.device).repeat_interleave(times))
        )

    def join(self, other: Task) -> Task:
        """Concatenate two batches with the same rules; seeds serve only sampling, which joins nothing."""
        return replace(
            self,
            longest_B=torch.cat((self.longest_B, other.longest_B)),
            shortest_B=torch.cat((self.shortest_B, other.shortest_B)),
            source_B=torch.cat((self.source_B, other.source_B)),
        )

    def select(self, kept_B: Tensor) -> Task:
        """Keep some of the sentences; seeds and rules are indexed by the whole batch."""
        return replace(
            self,
            longest_B=self.longest_B[kept_B],
            shortest_B=self.shortest_B[kept_B],
            source_B=self.source_B[kept_B],
        )


@dataclass(frozen=True)
class Candidates:
    """Continuations of the hypotheses of each sentence, best first."""

    rank_BC: Tensor  # for selection: the log probability minus the diversity penalty
    log_probability_BC: Tensor
    ids_BC: Tensor
    origin_BC: Tensor  # index of the continued hypothesis

    @classmethod
    def joined(cls, parts: Sequence[Candidates], join: Callable[[list[Tensor]], Tensor]) -> Candidates:
        return cls(*(join([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def length_penalty(length: Length, config: SearchConfig) -> Length:
    """Return the divisor of a log probability: GNMT's ((5 + n) / 6)^alpha (Wu et al. 2016, §7), or n^alpha."""
    base = (5 + length) / 6 if config.length_normalization == "gnmt" else length
    return base**config.length_penalty


def coverage_penalty(coverage_XS: Tensor, beta: float) -> Tensor:
    """Return beta · Σ over source positions of log(min(total attention, 1)) (Wu et al. 2016, §7)."""
    return beta * coverage_XS.clamp(1e-9, 1.0).log().sum(-1)


def leaders(
    logits_RV: Tensor, log_probability_BK: Tensor, count: int, length: int, task: Task, specials: Specials
) -> Candidates:
    """Return the `count` likeliest continuations of each sentence, without rules.

    Sentences are processed in chunks: their float logits stay in the cache, and never fill fresh memory.
    """
    B, K = log_probability_BK.shape
    early_B, last_B = ends(length, task)
    parts = []
    for start in range(0, B, max(1, ROWS // K)):
        here = slice(start, start + max(1, ROWS // K))
        early_R, last_R = (None if x is None else x[here].repeat_interleave(K) for x in (early_B, last_B))
        part_RV, total_R1 = allowed(logits_RV[here.start * K : here.stop * K], specials, early_R, last_R)
        parts.append(best(part_RV, log_probability_BK[here], count, total_R1))
    return parts[0] if len(parts) == 1 else Candidates.joined(parts, torch.cat)


def permit(
    logits_RV: Tensor, length: int, task: Task, specials: Specials, said_RT: Tensor | None, sentence_R: Tensor
) -> Tensor:
    """Return log probabilities of all next ids, −∞ where lengths, specials or rules forbid them."""
    rows = len(logits_RV) // len(task.longest_B)
    early_R, last_R = (None if x is None else x.repeat_interleave(rows) for x in ends(length, task))
    ban = None
    if task.rules is not None and said_RT is not None:
        final_R = (task.longest_B == length + 1).repeat_interleave(rows)
        ban = partial(task.rules.ban, raw_RV=logits_RV, said_RT=said_RT, sentence_R=sentence_R, final_R=final_R)
    permitted_RV, total_R1 = allowed(logits_RV, specials, early_R, last_R, ban)
    return permitted_RV.sub_(total_R1)


def ends(length: int, task: Task) -> tuple[Tensor | None, Tensor | None]:
    """Return which sentences may not end yet, and which must end now; None for none."""
    early_B, last_B = task.shortest_B > length, task.longest_B <= length
    return early_B if early_B.any() else None, last_B if last_B.any() else None


def allowed(
    raw_RV: Tensor,
    specials: Specials,
    early_R: Tensor | None,
    last_R: Tensor | None,
    ban: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return float logits, −∞ for forbidden ids, and the log-sum-exp of the unmasked logits."""
    logits_RV = raw_RV.to(torch.float32, copy=True)
    total_R1 = log_sum_exp(logits_RV)
    for id_ in specials.banned:
        logits_RV[:, id_] = NEVER
    if early_R is not None:
        logits_RV[early_R, specials.end] = NEVER
    if ban is not None:
        ban(logits_RV)
    if last_R is not None:
        # At its maximum length a sentence can only end.
        end_R = logits_RV[last_R, specials.end]
        logits_RV[last_R] = NEVER
        logits_RV[last_R, specials.end] = end_R
    return logits_RV, total_R1


def log_sum_exp(x_RV: Tensor) -> Tensor:
    """Reduce the last dimension to one column; `exp2` takes a quarter of the time of `exp` on a CPU."""
    log2e = 1 / math.log(2)
    best_R1 = x_RV.amax(-1, keepdim=True)
    return torch.add(-log2e * best_R1, x_RV, alpha=log2e).exp2_().sum(-1, keepdim=True).log() + best_R1


def best(x_RV: Tensor, before_BK: Tensor, count: int, total_R1: Tensor | None = None) -> Candidates:
    """Return the `count` best of x − total + before of each sentence, in a fraction of the time of `topk`.

    They lie in the vocabulary chunks with the best maxima.
    """
    (B, K), V = before_BK.shape, x_RV.shape[1]
    total_BK = torch.zeros_like(before_BK) if total_R1 is None else total_R1.view(B, K)
    whole_RV = pad(x_RV, (0, -V % WIDTH), value=NEVER) if V % WIDTH else x_RV
    x_BKGW = whole_RV.view(B, K, -1, WIDTH)
    G, device = x_BKGW.shape[2], x_RV.device
    if count < K * G:
        top_BKG = x_BKGW.amax(-1) - total_BK[:, :, None] + before_BK[:, :, None]
        chunk_BC = top_BKG.flatten(1).topk(count, sorted=False).indices
    else:
        chunk_BC = torch.arange(K * G, device=device).expand(B, -1)
    origin_BC = chunk_BC // G
    chunk_X = (chunk_BC + torch.arange(0, B * K * G, K * G, device=device)[:, None]).flatten()
    few_BCW = x_BKGW.flatten(0, 2).index_select(0, chunk_X).view(B, -1, WIDTH)
    few_BCW = few_BCW - total_BK.gather(1, origin_BC)[:, :, None] + before_BK.gather(1, origin_BC)[:, :, None]
    few_BX = few_BCW.flatten(1)
    value_BC, place_BC = few_BX.max(-1, keepdim=True) if count == 1 else few_BX.topk(min(count, K * V))
    found_BC = chunk_BC.gather(1, place_BC // WIDTH)
    ids_BC = found_BC % G * WIDTH + place_BC % WIDTH
    # Padding is found only where nothing is possible.
    return Candidates(value_BC, value_BC, ids_BC.clamp(max=V - 1), found_BC // G)
