"""Batches of a token budget from encoded pairs, determined by seed and epoch.

Shapes: B sentences, S source and T target positions. Masks are True for real tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from seq2seq.data.encoding import Batch, EncodedCorpus, Resegment
from seq2seq.data.store import Integers, key_of
from seq2seq.data.tokenizer import UNKNOWN


def split_by_token_budget(width: NDArray[Any], tokens: int) -> list[slice]:
    """Cut rows of ascending width into batches of at most `tokens` tokens, padding included."""
    cuts, start = [], 0
    while start < len(width):
        # Batch sizes that still fit form a prefix, because widths ascend.
        candidates = width[start : start + tokens]
        fit = int(np.searchsorted(candidates * np.arange(1, len(candidates) + 1), tokens, side="right"))
        stop = start + max(fit, 1)
        cuts.append(slice(start, stop))
        start = stop
    return cuts


def divide_rows(width: NDArray[Any], parts: int) -> list[slice]:
    """Divide a batch's rows, of ascending width, into parts whose largest has as few tokens as possible."""
    widest, most = int(width[-1]), -(-len(width) // parts)
    tokens = bisect_left(
        range(widest * most), True, lo=widest, key=lambda tokens: len(split_by_token_budget(width, tokens)) <= parts
    )
    cuts = split_by_token_budget(width, tokens)
    return cuts + [slice(len(width), len(width))] * (parts - len(cuts))


Taken = tuple[tuple[int, int], ...]  # token budgets, and the number of batches of each, in the order of training


class RankBatches(NamedTuple):
    """One process's part of an update."""

    micro_batches: list[Batch]
    target_tokens: int  # of the whole update, in all processes: each computes it without communication


class Batches:
    """Endless training batches; their order is a pure function of (seed, epoch), their state a few integers.

    An epoch is a permutation of the corpus, cut into pools; each pool is sorted by length, cut into batches of
    a token budget, and shuffled. Only one pool is ever in memory.
    """

    POOL = 2**17  # pairs

    def __init__(
        self,
        encoded: EncodedCorpus,
        tokens: int,
        seed: int,
        mix: Mix | None = None,
        resegment: Resegment | None = None,
        *,
        update_tokens: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.encoded, self.tokens, self.seed, self.mix, self.resegment = encoded, tokens, seed, mix, resegment
        self.update_tokens, self.rank, self.world_size = update_tokens, rank, world_size
        self.divide = False  # the processes divide the rows of each batch; else each takes a batch of its own
        self.epoch = self.pool = 0
        self.taken: Taken = ()  # of the pool
        self._permutation: tuple[int, Integers] = (-1, np.zeros(0, np.int64))
        self._cached_pool: tuple[tuple[int, int, int, Taken], list[Integers], EncodedCorpus] | None = None

    def divide_among(self, rank: int, world_size: int) -> None:
        """Yield only this rank's rows of each batch from now on."""
        self.rank, self.world_size, self.divide = rank, world_size, True

    @property
    def at_once(self) -> int:
        """The number of batches that the processes compute together."""
        return 1 if self.divide else self.world_size

    @property
    def earlier(self) -> Taken:
        """What batches of other budgets have taken of the pool: a resumed run may have another budget."""
        return self.taken[:-1] if self.taken and self.taken[-1][0] == self.tokens else self.taken

    @property
    def position(self) -> int:
        """The number of batches of the present budget that were taken of the pool."""
        return sum(count for _, count in self.taken[len(self.earlier) :])

    def order(self, epoch: int) -> Integers:
        """Return an epoch's pairs, shuffled; cached until another epoch is requested."""
        if self._permutation[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            every = np.arange(len(self.encoded), dtype=np.int32)
            rows: NDArray[Any] = self.mix.draw(random) if self.mix else every
            random.shuffle(rows)
            self._permutation = (epoch, rows)
        return self._permutation[1]

    def pools(self) -> int:
        return -(-len(self.order(self.epoch)) // self.POOL)

    def pool_batches(self, epoch: int, pool: int, earlier: Taken = ()) -> tuple[list[Integers], EncodedCorpus]:
        """Return the batches of what earlier ones have left of a pool, as rows of an encoded corpus."""
        key = (epoch, pool, self.tokens, earlier)
        if self._cached_pool is None or self._cached_pool[0] != key:
            shuffled = self.order(epoch)[pool * self.POOL : (pool + 1) * self.POOL]
            encoded = self.encoded
            if self.resegment:
                encoded = self.resegment(shuffled, key_of(self.seed, epoch, pool))
                shuffled = np.arange(len(encoded))
            seed = [self.seed, epoch, pool]
            for tokens, count in earlier:
                shuffled = np.concatenate([shuffled[:0], *cut_pool(encoded, shuffled, tokens, seed)[count:]])
            self._cached_pool = (key, cut_pool(encoded, shuffled, self.tokens, seed), encoded)
        return self._cached_pool[1], self._cached_pool[2]

    def rows(self, epoch: int) -> Iterator[Integers]:
        """Yield the corpus indices of each batch of an epoch."""
        for pool in range(-(-len(self.order(epoch)) // self.POOL)):
            batches, encoded = self.pool_batches(epoch, pool)
            yield from (encoded.rows[batch] for batch in batches)

    def estimate_padding(self) -> tuple[int, float]:
        """Estimate an epoch's number of batches and their fraction of padding, from its first pool."""
        batches, encoded = self.pool_batches(self.epoch, 0)
        sides = encoded.source.lengths(), encoded.target.lengths()
        padded_tokens = sum(len(rows) * int(side[rows].max()) for rows in batches for side in sides)
        real = sum(int(side[rows].sum()) for rows in batches for side in sides)
        pairs = len(self.order(self.epoch))
        return round(len(batches) * pairs / min(pairs, self.POOL)), 1 - real / max(padded_tokens, 1)

    def batches_per_epoch(self) -> float:
        """Estimate the number of batches per epoch."""
        return max(1, self.estimate_padding()[0])

    def pairs_per_epoch(self) -> int:
        return len(self.order(self.epoch))

    def target_tokens_per_epoch(self) -> int:
        """Estimate the target tokens of an epoch, from those of all pairs."""
        return round(int(self.encoded.target.ends[-1]) * self.pairs_per_epoch() / len(self.encoded))

    def updates_per_epoch(self) -> float:
        """Estimate the updates of an epoch, each of what is computed at once, or of as many batches as fill one."""
        steps = self.batches_per_epoch() / self.at_once
        return steps / math.ceil(max(1.0, self.update_tokens * steps / self.target_tokens_per_epoch()))

    def epochs_done(self, size: float) -> float:
        """Return the epochs done so far, with `size` batches each."""
        pairs = len(self.order(self.epoch))
        taken = sum(tokens * count for tokens, count in self.taken) / self.tokens
        return self.epoch + min(1.0, self.pool * self.POOL / pairs + taken / size)

    def __iter__(self) -> Generator[RankBatches]:
        """Yield this rank's part of each update: rows of each batch, or its own of `world_size` consecutive batches."""
        while True:
            # Counted before it is handed out: a checkpoint taken after its update starts at the next one.
            micro_batches: list[tuple[Integers, EncodedCorpus]] = []
            tokens = 0
            while not tokens or tokens < self.update_tokens:
                parts = [self._next() for _ in range(self.at_once)]
                micro_batches.append(self._own_rows(*parts[0]) if self.divide else parts[self.rank])
                tokens += sum(int(encoded.target.lengths(rows).sum()) for rows, encoded in parts)
            filled = [encoded.batch(rows) for rows, encoded in micro_batches if len(rows)]
            yield RankBatches(filled, target_tokens=tokens)

    def _own_rows(self, rows: Integers, encoded: EncodedCorpus) -> tuple[Integers, EncodedCorpus]:
        width = np.maximum(encoded.source.lengths(rows), encoded.target.lengths(rows))
        return rows[divide_rows(width, self.world_size)[self.rank]], encoded

    def _next(self) -> tuple[Integers, EncodedCorpus]:
        while True:
            earlier, position = self.earlier, self.position
            batches, encoded = self.pool_batches(self.epoch, self.pool, earlier)
            if position < len(batches):
                self.taken = (*earlier, (self.tokens, position + 1))
                return batches[position], encoded
            self.pool, self.taken = self.pool + 1, ()
            if self.pool >= self.pools():
                self.epoch, self.pool = self.epoch + 1, 0

    def catch_up(self, ahead: Batches) -> None:
        """Continue from the position of a copy that is ahead, with the permutation and the pool that it has cached."""
        self.epoch, self.pool, self.taken = ahead.epoch, ahead.pool, ahead.taken
        self._permutation, self._cached_pool = ahead._permutation, ahead._cached_pool

    def state_dict(self) -> dict[str, Any]:
        progress = {"epoch": self.epoch, "pool": self.pool, "taken": [list(part) for part in self.taken]}
        return {"seed": self.seed, **self._drawn_from(), **progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Until version 0.1.0, a state had a position without its budget, and no mix.
        taken = state["taken"] if "taken" in state else [(self.tokens, state["position"])]
        drawn_from = {"pairs": state["pairs"], "mix": state.get("mix", self._drawn_from()["mix"])}
        self.seed, self.epoch, self.pool = state["seed"], state["epoch"], state["pool"]
        self.taken = tuple((tokens, count) for tokens, count in taken)
        if drawn_from != self._drawn_from():
            # With another corpus, limit or mix the old position is meaningless, so the next epoch begins.
            self.epoch, self.pool, self.taken = self.epoch + 1, 0, ()
        self._permutation, self._cached_pool = (-1, np.zeros(0, np.int64)), None

    def _drawn_from(self) -> dict[str, Any]:
        """Return what an epoch is drawn from."""
        return {"pairs": len(self.encoded), "mix": list(self.mix.counts) if self.mix else []}


def cut_pool(encoded: EncodedCorpus, rows: Integers, tokens: int, seed: list[int]) -> list[Integers]:
    """Sort rows by length, cut them into batches of a token budget, and shuffle these."""
    width = np.maximum(encoded.source.lengths(rows), encoded.target.lengths(rows))
    # Sort by the longer side only: a stricter order pads less, but groups the same sentences in every epoch.
    order = np.argsort(width, kind="stable")
    batches = [rows[order[part]] for part in split_by_token_budget(width[order], tokens)]
    return [batches[i] for i in np.random.default_rng(seed).permutation(len(batches))]


@dataclass(frozen=True)
class Mix:
    """A mix of corpora: the number of pairs that an epoch draws from each."""

    ends: tuple[int, ...]  # where each corpus ends among the encoded pairs
    counts: tuple[int, ...]

    def draw(self, random: np.random.Generator) -> Integers:
        """Draw an epoch's pairs; an exhausted corpus starts over."""
        drawn = []
        for start, end, count in zip((0, *self.ends), self.ends, self.counts, strict=False):
            copies, remainder = divmod(count, end - start) if end > start else (0, 0)
            drawn += [np.arange(start, end)] * copies + [start + random.permutation(end - start)[:remainder]]
        return np.concatenate(drawn)


def temperature_mix(ends: Sequence[int], weights: Sequence[float], temperature: float) -> Mix:
    """Weight corpus i by (its pairs × weight) ^ (1 / temperature); an epoch has as many pairs as all corpora."""
    sizes = np.diff([0, *ends])
    logs = np.log(np.maximum(sizes * np.array(weights), 1e-300)) / temperature
    probabilities = np.exp(logs - logs.max())
    counts = np.round(probabilities / probabilities.sum() * sizes.sum()).astype(int)
    return Mix(tuple(map(int, ends)), tuple(map(int, counts)))


def largest_batch(encoded: EncodedCorpus, tokens: int, parts: int = 1) -> Batch:
    """Return the budget's batch that takes the most memory: the longest pair, repeated, both sides at its width.

    Of a batch divided into parts, return the largest part.
    """
    width = int(encoded.width().max())
    ids_BT = torch.full((-(-max(1, tokens // width) // parts), width), UNKNOWN)
    return Batch.of(ids_BT, ids_BT, torch.zeros(len(ids_BT), dtype=torch.int64))


def example_batches(encoded: EncodedCorpus) -> list[Batch]:
    """Return two small batches of different shape, from the pairs whose sides differ most in length."""
    rows = np.arange(min(len(encoded), 2**10))
    difference = np.abs(encoded.source.lengths(rows) - encoded.target.lengths(rows))
    rows = rows[np.argsort(-difference, kind="stable")]
    return [encoded.batch(np.resize(rows, count)) for count in (2, 5)]


def sequential_batches(corpus: EncodedCorpus, tokens: int) -> Iterator[Batch]:
    """Yield every pair once, short ones first: for validation."""
    width = corpus.width()
    order = np.argsort(width, kind="stable")
    for cut in split_by_token_budget(width[order], tokens):
        yield corpus.batch(order[cut])
