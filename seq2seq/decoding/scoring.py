"""Hypotheses, candidates and scores of a search, independent of the model.

Shapes: B sentences, K hypotheses of each, R rows, S source positions, T target positions, V vocabulary, C candidates,
N vocabulary chunks of W columns for each hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig
from seq2seq.decoding.constraints import NEG_INF, Rules
from seq2seq.model.attention import concatenate_padded


@dataclass(frozen=True)
class Beams:
    """Live hypotheses, and the best finished ones so far."""

    index_B: Tensor  # sentence index × number of groups + group
    last_BK: Tensor  # the last token
    log_probability_BK: Tensor
    finished_score_BK: Tensor  # best first
    finished_log_probability_BK: Tensor
    finished_node_BK: Tensor  # final step × K + hypothesis index
    prefix_BKT: Tensor | None  # all tokens, if rules need them
    phrase_states_BKX: Tensor | None  # states of the automata of phrases
    coverage_BKS: Tensor | None  # attention to each source position, if penalised

    def select(self, kept_B: Tensor) -> Beams:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[kept_B] for name, value in values.items() if value is not None})

    def join(self, other: Beams) -> Beams:
        values: dict[str, Any] = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            # Source padding counts as covered.
            values[field.name] = None if a is None else concatenate_padded(a, b, float(field.name == "coverage_BKS"))
        return Beams(**values)


Length = TypeVar("Length", float, Tensor)
# What every search honours, a compiled one and CTranslate2's too; any other key makes a search special.
PLAIN_KEYS = (
    *("beam", "n_best", "length_normalization", "length_penalty", "length_factor", "length_extra", "select_by"),
    *("shortlist", "tokens", "graphs"),  # engines deal with shortlists themselves
    # Without effect unless groups or samples, which are special, are set.
    *("diversity", "temperature", "top_k", "top_p", "min_p", "epsilon_cutoff", "seed"),
)
CHUNK_WIDTH = 64  # vocabulary columns per chunk in `top_candidates`
NO_ID = -1  # padding of prefixes


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
class DecodingTask:
    """Length limits, prefixes, seeds and rules of a batch; lengths include END.

    Optional columns are the same ones in all batches of a search.
    """

    max_length_B: Tensor
    min_length_B: Tensor | None
    source_length_B: Tensor  # source positions of each sentence without padding, for its coverage
    seeds: Sequence[int]  # sampling seed of each sentence, the same in every batch
    rules: Rules | None = None
    prefix_BP: Tensor | None = None  # ids that each sentence begins with, padded with NO_ID
    # The only ids that each sentence may use, ascending, padded with NO_ID; all of them have every special id, which
    # lie first in the vocabulary. The columns of logits are then those of the shortlist.
    shortlist_BU: Tensor | None = None

    @property
    def shortlist(self) -> tuple[Tensor, ...]:
        """What a step takes besides tokens and state."""
        return () if self.shortlist_BU is None else (self.shortlist_BU,)

    def ids(self, columns_BX: Tensor) -> Tensor:
        """Return the ids of columns of logits; padding, found only where nothing is possible, is id 0."""
        if self.shortlist_BU is None:
            return columns_BX
        return self.shortlist_BU.gather(1, columns_BX).clamp_(min=0)

    def spread(self, logits_RU: Tensor, vocabulary: int) -> tuple[Tensor, DecodingTask]:
        """Return the logits of all ids, −∞ outside of the shortlists, and the task without these."""
        if self.shortlist_BU is None:
            return logits_RU, self
        ids_RU = self.shortlist_BU.repeat_interleave(len(logits_RU) // len(self.shortlist_BU), 0)
        # Padding goes to a column of its own.
        logits_RV = logits_RU.new_full((len(logits_RU), vocabulary + 1), NEG_INF)
        logits_RV.scatter_(1, ids_RU.where(ids_RU >= 0, vocabulary), logits_RU)
        return logits_RV[:, :vocabulary].contiguous(), replace(self, shortlist_BU=None)

    def repeat(self, times: int) -> DecodingTask:
        """Repeat each sentence `times` times in a row."""
        B = len(self.max_length_B)
        return (
            self
            if times == 1
            else self.select(torch.arange(B, device=self.max_length_B.device).repeat_interleave(times))
        )

    def join(self, other: DecodingTask) -> DecodingTask:
        """Concatenate two batches with the same rules; seeds serve only sampling, which joins nothing."""
        columns, others = self._columns(), other._columns()
        joined: dict[str, Any] = {name: concatenate_padded(x, others[name], NO_ID) for name, x in columns.items()}
        return replace(self, **joined)

    def select(self, kept_B: Tensor | slice) -> DecodingTask:
        """Keep some of the sentences; seeds are indexed by the whole batch."""
        return replace(self, **{name: column[kept_B] for name, column in self._columns().items()})

    def _columns(self) -> dict[str, Any]:
        return {field.name: x for field in fields(self) if isinstance(x := getattr(self, field.name), Tensor)}

    def remaining(self, length: int, decided_B: Tensor) -> NDArray[np.int64]:
        """Return how many more tokens each sentence may have, 0 if it is decided: the one transfer of a step."""
        remaining_B: NDArray[np.int64] = (self.max_length_B - length).masked_fill(decided_B, 0).cpu().numpy()
        return remaining_B


@dataclass(frozen=True)
class Candidates:
    """Continuations of the hypotheses of each sentence, best first."""

    selection_score_BC: Tensor  # the log probability minus the diversity penalty
    log_probability_BC: Tensor
    ids_BC: Tensor
    origin_BC: Tensor  # index of the continued hypothesis

    @classmethod
    def combine(cls, parts: Sequence[Candidates], join: Callable[[list[Tensor]], Tensor]) -> Candidates:
        return cls(*(join([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def special_keys(config: SearchConfig) -> list[str]:
    """Return the keys that make a search more than a plain beam search."""
    plain, special = search_preset("greedy"), (f.name for f in fields(SearchConfig) if f.name not in PLAIN_KEYS)
    return [key for key in special if getattr(config, key) != getattr(plain, key)]


def length_penalty(length: Length, config: SearchConfig) -> Length:
    """Return the divisor of a log probability: GNMT's ((5 + n) / 6)^alpha (Wu et al. 2016, §7), or n^alpha."""
    base = (5 + length) / 6 if config.length_normalization == "gnmt" else length
    return base**config.length_penalty


def coverage_penalty(coverage_XS: Tensor, beta: float) -> Tensor:
    """Return beta · Σ over source positions of log(min(total attention, 1)) (Wu et al. 2016, §7)."""
    return beta * coverage_XS.clamp(1e-9, 1.0).log().sum(-1)


def log_sum_exp(x_RV: Tensor) -> Tensor:
    """Reduce the last dimension to one column; `exp2` takes a quarter of the time of `exp` on a CPU."""
    log2e = 1 / math.log(2)
    best_R1 = x_RV.amax(-1, keepdim=True)
    return torch.add(-log2e * best_R1, x_RV, alpha=log2e).exp2_().sum(-1, keepdim=True).log() + best_R1


def top_candidates(
    x_RV: Tensor, log_probability_BK: Tensor, count: int, normalizer_R1: Tensor | None = None
) -> Candidates:
    """Return the `count` best of x − total + before of each sentence, in a fraction of the time of `topk`.

    They lie in the vocabulary chunks with the best maxima.
    """
    (B, K), V = log_probability_BK.shape, x_RV.shape[1]
    normalizer_BK = torch.zeros_like(log_probability_BK) if normalizer_R1 is None else normalizer_R1.view(B, K)
    padded_RV = pad(x_RV, (0, -V % CHUNK_WIDTH), value=NEG_INF) if V % CHUNK_WIDTH else x_RV
    x_BKNW = padded_RV.view(B, K, -1, CHUNK_WIDTH)
    N, device = x_BKNW.shape[2], x_RV.device
    if count < K * N:
        max_BKN = x_BKNW.amax(-1) - normalizer_BK[:, :, None] + log_probability_BK[:, :, None]
        chunk_BC = max_BKN.flatten(1).topk(count, sorted=False).indices
    else:
        chunk_BC = torch.arange(K * N, device=device).expand(B, -1)
    origin_BC = chunk_BC // N
    chunk_X = (chunk_BC + torch.arange(0, B * K * N, K * N, device=device)[:, None]).flatten()
    chunk_BCW = x_BKNW.flatten(0, 2).index_select(0, chunk_X).view(B, -1, CHUNK_WIDTH)
    chunk_BCW = (
        chunk_BCW - normalizer_BK.gather(1, origin_BC)[:, :, None] + log_probability_BK.gather(1, origin_BC)[:, :, None]
    )
    value_BX = chunk_BCW.flatten(1)
    value_BC, index_BC = value_BX.max(-1, keepdim=True) if count == 1 else value_BX.topk(min(count, K * V))
    top_chunk_BC = chunk_BC.gather(1, index_BC // CHUNK_WIDTH)
    ids_BC = top_chunk_BC % N * CHUNK_WIDTH + index_BC % CHUNK_WIDTH
    # Padding is found only where nothing is possible.
    return Candidates(value_BC, value_BC, ids_BC.clamp(max=V - 1), top_chunk_BC // N)
