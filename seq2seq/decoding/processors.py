"""Step processors: each rule about the next token is one object that changes the logits of a step.

Shapes: B sentences, K hypotheses of each, R = B × K rows, T target positions, P positions of forced prefixes,
V vocabulary or shortlist, X automata of phrases.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seq2seq.decoding import native_search
from seq2seq.decoding.constraints import NEG_INF, Rules, ban_repeats
from seq2seq.decoding.scoring import Candidates, DecodingTask, Specials, log_sum_exp, top_candidates

CHUNK_ROWS = 128  # rows of logits that a CPU processes together: they stay in its cache


class StepInput(NamedTuple):
    """What processors know of a step."""

    raw_RV: Tensor  # the model's logits
    length: int  # of the hypotheses with the next token
    task: DecodingTask
    at_limit: bool  # whether any sentence must end
    prefix_RT: Tensor | None  # all tokens, if a processor needs them
    phrase_states_RX: Tensor | None  # states of the automata of phrases

    def part(self, sentences: slice) -> StepInput:
        """Return the step of some sentences."""
        K = len(self.raw_RV) // len(self.task.max_length_B)
        rows = slice(sentences.start * K, sentences.stop * K)
        return self._replace(
            raw_RV=self.raw_RV[rows],
            task=self.task.select(sentences),
            prefix_RT=None if self.prefix_RT is None else self.prefix_RT[rows],
            phrase_states_RX=None if self.phrase_states_RX is None else self.phrase_states_RX[rows],
        )

    def rows(self, x_B: Tensor) -> Tensor:
        """Repeat what belongs to sentences for their rows."""
        return x_B.repeat_interleave(len(self.raw_RV) // len(x_B), 0)


class Processor(Protocol):
    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        """Change float logits in place: −∞ excludes an id."""


def step_processors(task: DecodingTask, specials: Specials) -> list[Processor]:
    """Return the processors that a task needs, in order: later ones may allow what earlier ones excluded."""
    rules = task.rules
    processors: list[Processor] = [BanSpecials(specials.banned)]
    if task.min_length_B is not None:
        processors.append(MinLength(specials.end))
    if rules and rules.no_repeat:
        processors.append(NoRepeat(rules.no_repeat))
    if rules and rules.has_phrases:
        processors.append(LexicalConstraints(rules))
    if rules:
        processors.append(EndIfStuck(specials.end))
    if task.prefix_BP is not None:
        processors.append(ForcedPrefix())
    return [*processors, MaxLength(specials.end)]


@dataclass(frozen=True)
class BanSpecials:
    banned: Sequence[int]

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        for id_ in self.banned:
            logits_RV[:, id_].fill_(NEG_INF)


@dataclass(frozen=True)
class MinLength:
    """A sentence does not end before its minimum length."""

    end: int

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        assert step.task.min_length_B is not None
        logits_RV[:, self.end].masked_fill_(step.rows(step.task.min_length_B > step.length), NEG_INF)


@dataclass(frozen=True)
class NoRepeat:
    n: int

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        assert step.prefix_RT is not None
        ban_repeats(logits_RV, step.prefix_RT[:, 1:], self.n)


@dataclass(frozen=True)
class LexicalConstraints:
    """Forbidden words do not appear, and a sentence does not end before its required words."""

    rules: Rules

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        assert step.phrase_states_RX is not None
        final_R = step.rows(step.task.max_length_B == step.length + 1)
        logits_RV.masked_fill_(self.rules.banned(step.phrase_states_RX, final_R), NEG_INF)


@dataclass(frozen=True)
class EndIfStuck:
    """A hypothesis that nothing may follow ends."""

    end: int

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        stuck_R = logits_RV.amax(-1) == NEG_INF
        logits_RV[:, self.end] = step.raw_RV[:, self.end].where(stuck_R, logits_RV[:, self.end])


@dataclass(frozen=True)
class ForcedPrefix:
    """Only the next id of a prefix follows as long as it is incomplete, whatever other rules say."""

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        prefix_BP = step.task.prefix_BP
        if prefix_BP is None or step.length > prefix_BP.shape[1]:
            return
        id_R1 = step.rows(prefix_BP[:, step.length - 1])[:, None]
        shortlist_BU = step.task.shortlist_BU
        ids = torch.arange(logits_RV.shape[1], device=id_R1.device) if shortlist_BU is None else step.rows(shortlist_BU)
        forced_RV = step.raw_RV.where(ids == id_R1, NEG_INF)
        logits_RV.copy_(forced_RV.where(id_R1 >= 0, logits_RV))


@dataclass(frozen=True)
class MaxLength:
    """At its maximum length a sentence can only end."""

    end: int

    def __call__(self, logits_RV: Tensor, step: StepInput) -> None:
        if step.at_limit:
            at_limit_R1 = step.rows(step.task.max_length_B <= step.length)[:, None]
            is_word_V = torch.arange(logits_RV.shape[1], device=logits_RV.device) != self.end
            logits_RV.masked_fill_(at_limit_R1 & is_word_V, NEG_INF)


def process(step: StepInput, processors: Sequence[Processor]) -> tuple[Tensor, Tensor]:
    """Return float logits after all processors, and the log-sum-exp of the model's."""
    logits_RV = step.raw_RV.to(torch.float32, copy=True)
    normalizer_R1 = log_sum_exp(logits_RV)
    for processor in processors:
        processor(logits_RV, step)
    return logits_RV, normalizer_R1


def next_log_probabilities(step: StepInput, processors: Sequence[Processor]) -> Tensor:
    """Return log probabilities of all next ids, −∞ where a processor excludes them."""
    logits_RV, normalizer_R1 = process(step, processors)
    return logits_RV.sub_(normalizer_R1)


def next_candidates(
    step: StepInput,
    processors: Sequence[Processor],
    log_probability_BK: Tensor,
    count: int,
    library: CDLL | None = None,
) -> Candidates:
    """Return the `count` likeliest continuations of each sentence.

    A CPU processes sentences in chunks: their float logits stay in the cache, and never fill fresh memory.
    """
    if library and step.raw_RV.dtype == torch.float32:
        return _native_candidates(library, step, processors, log_probability_BK, count)
    B, K = log_probability_BK.shape
    size = max(1, CHUNK_ROWS // K) if step.raw_RV.device.type == "cpu" else B
    parts = []
    for start in range(0, B, size):
        chunk = slice(start, min(start + size, B))
        logits_RV, normalizer_R1 = process(step.part(chunk) if size < B else step, processors)
        parts.append(top_candidates(logits_RV, log_probability_BK[chunk], count, normalizer_R1))
    return parts[0] if len(parts) == 1 else Candidates.combine(parts, torch.cat)


def _native_candidates(
    library: CDLL, step: StepInput, processors: Sequence[Processor], log_probability_BK: Tensor, count: int
) -> Candidates:
    """Do the same by compiled code, which makes no intermediate results; the step's logits may be overwritten."""
    logits_RV = step.raw_RV.contiguous()
    normalizer_R1 = native_search.log_sum_exp(library, logits_RV)
    if any(isinstance(processor, (EndIfStuck, ForcedPrefix)) for processor in processors):  # they read both
        logits_RV = step.raw_RV.clone()
    for processor in processors:
        processor(logits_RV, step)
    return native_search.top_candidates(library, logits_RV, log_probability_BK, count, normalizer_R1)
