"""Beam search and sampling for one sentence, with lists and loops in float64.

A model is two functions of a prefix: the logits of the next id, and the attention to the source at that step. Beam
search finishes an END among the K best continuations and goes on with the K best others; groups take turns
(Vijayakumar et al. 2016, §4.1); scores are those of Wu et al. (2016, §7); required phrases divide the beam as in Post &
Vilar (2018, §3.2). Options are read by name from any object that has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference.constraints import PlainRules

Numbers = NDArray[np.float64]
Prefix = tuple[int, ...]
TIE = 1e-4  # what float32 may decide otherwise than float64


@dataclass(frozen=True)
class Model:
    logits: Callable[[Prefix], Numbers]
    attention: Callable[[Prefix], Numbers]

    def log_probabilities(self, prefix: Prefix) -> Numbers:
        x = self.logits(prefix)
        return x - math.log(sum(np.exp(x - x.max()))) - x.max()


@dataclass(frozen=True)
class Request:
    """What is asked for one sentence; lengths count END."""

    shortest: int
    longest: int
    end: int
    banned: Sequence[int]
    rules: PlainRules | None = None


@dataclass(frozen=True)
class Path:
    """A hypothesis, live or finished (then END is the last of `ids`)."""

    ids: Prefix = ()
    each: tuple[float, ...] = ()  # log probability of each id
    score: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.each)


@dataclass
class Outcome:
    finished: list[Path]
    steps: int
    clear: bool  # no decision was a tie, or nearly one
    best: Sequence[Prefix | None] = ()  # after each step of a beam, without END; None where it is a tie


@dataclass
class Ties:
    clear: bool = True

    def ranked(self, values: Sequence[float]) -> None:
        """Values whose order matters."""
        ordered = sorted(values)
        self.clear &= all(b - a > TIE for a, b in pairwise(ordered))


@dataclass
class Group:
    live: list[Path] = field(default_factory=lambda: [Path()])
    finished: list[Path] = field(default_factory=list)


def length_penalty(length: int, options: Any) -> float:
    if options.length_normalization == "gnmt":
        return float(((5 + length) / 6) ** options.length_penalty)
    return float(length**options.length_penalty)


def coverage_penalty(ids: Prefix, model: Model, beta: float) -> float:
    """Over the steps that produced these ids; each source position counts at most once (Wu et al. 2016, §7)."""
    attention_TS = np.stack([model.attention(ids[:t]) for t in range(len(ids))])
    return float(beta * sum(math.log(min(max(x, 1e-9), 1.0)) for x in attention_TS.sum(0)))


def beam_search(model: Model, request: Request, options: Any) -> Outcome:
    """The best different translations of all groups, and after how many steps the search has stopped."""
    K, end, ties = options.beam // options.groups, request.end, Ties()
    groups = [Group() for _ in range(options.groups)]
    best: list[Prefix | None] = []
    length = 0
    while True:
        length += 1
        taken: dict[int, int] = {}
        for group in groups:
            penalty = {id_: options.diversity * n for id_, n in taken.items()}
            ranked = _continuations(group, model, request, length, penalty, K)
            ties.ranked([rank for rank, _ in ranked[: 2 * K + 1]])
            group.finished += [_scored(path, model, options) for _, path in _may_end(ranked, request, K, ties)]
            group.finished.sort(key=lambda path: -path.score)
            group.finished = group.finished[:K]
            ties.ranked([path.score for path in group.finished])
            group.live = _going_on(ranked, group, request, length, K)
            if K == 1 and options.stop == "filled" and group.finished:
                group.live = []  # a greedy group has its translation
            for path in group.live:
                taken[path.ids[-1]] = taken.get(path.ids[-1], 0) + 1
        best.append(_best(groups, model, options, length))
        if length >= request.longest or all(_decided(g, request, options, length, K, ties) for g in groups):
            break
    different = {path.ids: path for group in groups for path in group.finished}
    ordered = sorted(different.values(), key=lambda path: -path.score)
    ties.ranked([path.score for path in ordered])
    count = options.n_best if options.select_by == "score" else options.beam
    assert all(path.ids[-1] == end for path in ordered)
    return Outcome(ordered[:count], length, ties.clear, best)


def _best(groups: list[Group], model: Model, options: Any, length: int) -> Prefix | None:
    """The best hypothesis, finished or live; a live one is scored as if the next token ended it."""
    scores = {path.ids[:-1]: path.score for group in groups for path in group.finished}
    for path in (path for group in groups for path in group.live):
        score = path.total / length_penalty(length + 1, options)
        if options.coverage_penalty:
            score += coverage_penalty(path.ids, model, options.coverage_penalty)
        scores[path.ids] = max(score, scores.get(path.ids, score))
    if not scores:
        return None
    first, *others = sorted(scores.items(), key=lambda one: -one[1])
    return None if others and first[1] - others[0][1] <= TIE else first[0]


def _continuations(
    group: Group, model: Model, request: Request, length: int, penalty: dict[int, float], K: int
) -> list[tuple[float, Path]]:
    """Every possible continuation of the live hypotheses, best first, with what it is ranked by."""
    found = []
    for path in group.live:
        logs, total = model.log_probabilities(path.ids).tolist(), path.total
        for id_ in allowed_ids(path.ids, len(logs), request, length):
            found.append((total + logs[id_] - penalty.get(id_, 0.0), id_, logs[id_], path))
    found.sort(key=lambda one: one[0], reverse=True)
    if not (request.rules and request.rules.required):
        del found[2 * K + 1 :]  # K of them may end and K go on
    return [(rank, Path((*path.ids, id_), (*path.each, log))) for rank, id_, log, path in found]


def allowed_ids(prefix: Prefix, vocabulary: int, request: Request, length: int) -> list[int]:
    """The ids that may come next, as the id number `length` counted from 1."""
    allowed = sorted({*range(vocabulary)} - {*request.banned})
    if length < request.shortest:
        allowed.remove(request.end)
    if request.rules:
        allowed = request.rules.filtered(prefix, allowed, final=length == request.longest - 1)
    if length >= request.longest:
        allowed = [id_ for id_ in allowed if id_ == request.end]
    return allowed


def _may_end(ranked: list[tuple[float, Path]], request: Request, K: int, ties: Ties) -> list[tuple[float, Path]]:
    """Those that end among the K best; complete hypotheses come first, and others end only with no other way on."""
    rules = request.rules
    if rules and rules.required:
        ranked = sorted(ranked, key=lambda one: len(rules.missing(one[1].ids[:-1])) > 0)
        stuck = [path for _, path in ranked if path.ids[-1] == request.end and rules.missing(path.ids[:-1])]
        ties.clear &= K == 1 or not stuck  # a phrase's next id may be counted twice among the K best
    return [(rank, path) for rank, path in ranked[:K] if path.ids[-1] == request.end]


def _going_on(ranked: list[tuple[float, Path]], group: Group, request: Request, length: int, K: int) -> list[Path]:
    going_on = [path for _, path in ranked if path.ids[-1] != request.end]
    if request.rules and request.rules.required:
        # The 2K best continuations of each hypothesis, and those that continue a phrase.
        rules, considered = request.rules, []
        for parent in group.live:
            own = [path for _, path in ranked if path.ids[:-1] == parent.ids]
            wanted = rules.wanted(parent.ids)
            considered += [p.ids for i, p in enumerate(own) if i < 2 * K or p.ids[-1] in wanted]
        candidates = [path for path in going_on if path.ids in considered]
        chosen = rules.allocated([path.ids for path in candidates], K, request.longest - length)
        return [path for path in candidates if path.ids in chosen]
    return going_on[:K]


def _scored(path: Path, model: Model, options: Any) -> Path:
    score = path.total / length_penalty(len(path.ids), options)
    if options.coverage_penalty:
        score += coverage_penalty(path.ids, model, options.coverage_penalty)
    return Path(path.ids, path.each, score)


def _decided(group: Group, request: Request, options: Any, length: int, K: int, ties: Ties) -> bool:
    """Whether no further step is needed by the rule `stop`."""
    if options.stop == "longest":
        return False
    if options.stop == "filled":
        return len(group.finished) == K
    if not group.live:
        return True
    kept = min(options.n_best, K) if options.select_by == "score" else K
    if len(group.finished) < kept:
        return False
    after = request.longest if options.stop == "certain" else length + 1
    hope = max(path.total for path in group.live) / length_penalty(after, options)
    ties.ranked([group.finished[kept - 1].score, hope])
    return group.finished[kept - 1].score >= hope


# ------------------------------------------------------------------------------------- which rows each step computes


def batch_rows(steps: Sequence[Sequence[int]]) -> list[list[int]]:
    """The sentences that each call of the step function is given, in order, from the steps each sentence needs.

    A batch goes on until a quarter of its sentences is left; these wait until the next batch is as far. Decided
    sentences leave when what remains falls to one of few sizes: a multiple of the largest power of two that divides
    the count into at least four parts.
    """
    calls: list[list[int]] = []
    needed = [n for batch in steps for n in batch]
    waiting: tuple[int, list[int]] | None = None  # length, rows

    def is_open(row: int, length: int) -> bool:
        return needed[row] > length

    def count(length: int, rows: list[int]) -> int:
        return sum(is_open(row, length) for row in rows)

    def advanced(length: int, rows: list[int]) -> tuple[int, list[int]]:
        calls.append(rows)
        length += 1
        if any(needed[row] == length for row in rows):
            n = count(length, rows)
            step = 1
            while n // (2 * step) >= 4:
                step *= 2
            size = math.ceil(n / step) * step
            if size < len(rows):
                rows = sorted(rows, key=lambda row: not is_open(row, length))[:size]
        return length, rows

    first = 0
    for batch in steps:
        now = (0, list(range(first, first + len(batch))))
        first += len(batch)
        while count(*now) and (waiting or count(*now) > 0.25 * len(batch)):
            now = advanced(*now)
            if waiting and waiting[0] == now[0]:
                now, waiting = (now[0], now[1] + waiting[1]) if count(*now) else waiting, None
        if not waiting and count(*now):
            waiting = now
    while waiting and count(*waiting):
        waiting = advanced(*waiting)
    return calls


# ------------------------------------------------------------------------------------------------------------ sampling


def splitmix(x: int) -> int:
    """The output function of SplitMix64 (Steele et al. 2014, §3), on Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


GAMMA = 0x9E3779B97F4A7C15


def uniform(sentence_seed: int, seed: int, number: int, step: int) -> float:
    """The number from 0 to 1 that decides step `step` (from 1) of sample `number` (from 0) of a sentence."""
    of_sentence = splitmix((sentence_seed + splitmix(seed)) % 2**64)
    of_sample = splitmix((of_sentence + (number + 1) * GAMMA) % 2**64)
    return (splitmix((of_sample + step * GAMMA) % 2**64) >> 32) / 2**32


def shaped(logs: Numbers, options: Any, ties: Ties) -> Numbers:
    """Tempered probabilities after each cut in its turn, not normalised."""
    x = logs / options.temperature
    if 0 < options.top_k < len(x):
        least = sorted(x, reverse=True)[options.top_k - 1]
        x = np.where(x >= least, x, -np.inf)
    p = np.exp(x - x.max())
    p = p / p.sum()
    if options.top_p < 1:
        before, kept = 0.0, np.zeros(len(p))
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            ties.clear &= abs(before - options.top_p) > 1e-5
            if before < options.top_p:
                kept[i] = p[i]
            before += p[i]
        p = kept
    if options.min_p > 0:
        ties.clear &= all(abs(x - options.min_p * p.max()) > 1e-6 or x == p.max() for x in p)
        p = np.where(p >= options.min_p * p.max(), p, 0.0)
    if options.epsilon_cutoff > 0:
        q = p / p.sum()
        ties.clear &= all(abs(x - options.epsilon_cutoff) > 1e-6 for x in q)
        p = np.where((q >= options.epsilon_cutoff) | (q == q.max()), p, 0.0)
    return p


def sample(model: Model, request: Request, options: Any, sentence_seed: int) -> Outcome:
    """`samples` translations, best first, each drawn by its own numbers; scored like those of a beam."""
    drawn, ties, steps = [], Ties(), 0
    for number in range(options.samples):
        path = Path()
        while not path.ids or path.ids[-1] != request.end:
            length = len(path.ids) + 1
            logs = model.log_probabilities(path.ids)
            masked = np.full(len(logs), -np.inf)
            allowed = allowed_ids(path.ids, len(logs), request, length)
            masked[allowed] = logs[allowed]
            p = shaped(masked, options, ties)
            wanted = uniform(sentence_seed, options.seed, number, length) * p.sum()
            upto = np.cumsum(p)
            ties.clear &= bool(np.abs(upto[:-1] - wanted).min() > 1e-6)
            id_ = next(i for i in range(len(p)) if upto[i] > wanted)
            path = Path((*path.ids, id_), (*path.each, float(logs[id_])))
        steps = max(steps, len(path.ids))
        drawn.append(Path(path.ids, path.each, path.total / length_penalty(len(path.ids), options)))
    ties.ranked(list({path.ids: path.score for path in drawn}.values()))
    return Outcome(sorted(drawn, key=lambda path: -path.score), steps, ties.clear)
