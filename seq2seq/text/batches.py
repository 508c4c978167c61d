"""Sentence pairs as ids → batches of a token budget, the same for the same seed and epoch.

Shapes: B sentences, S source and T target positions. Masks are True for real tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seq2seq.text.corpus import Corpus
from seq2seq.text.tokenizer import BEGIN, PAD, Tokenizer

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Padded pairs; `target_in` begins with BEGIN, `target_out` is what the model must say at each place."""

    source_BS: Tensor
    source_mask_BS: Tensor
    target_in_BT: Tensor
    target_out_BT: Tensor
    index_B: Tensor  # the pairs' places in the corpus

    @property
    def target_mask_BT(self) -> Tensor:
        return self.target_out_BT != PAD

    @property
    def target_tokens(self) -> int:
        return int(self.target_mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


class Ragged:
    """Many lists of ids in one flat array."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self.ends = np.cumsum(self.lengths)
        self.flat = np.fromiter((i for row in rows for i in row), np.int32, int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, rows: Integers) -> NDArray[np.int64]:
        """The named rows as one matrix, filled with PAD on the right."""
        lengths = self.lengths[rows]
        column = np.arange(lengths.max())
        inside = column < lengths[:, None]
        matrix = np.full(inside.shape, PAD, np.int64)
        matrix[inside] = self.flat[((self.ends[rows] - lengths)[:, None] + column)[inside]]
        return matrix


@dataclass(frozen=True)
class EncodedCorpus:
    """Pairs as ids, each side with its END; `dropped` counts the pairs left out as empty or too long."""

    source: Ragged
    target: Ragged
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, rows: Integers) -> Batch:
        source, target = self.source.padded(rows), self.target.padded(rows)
        begin = np.full((len(rows), 1), BEGIN, np.int64)
        # A sentence's END turns up in target_in where target_out holds only padding: nobody looks there.
        target_in = np.concatenate([begin, target[:, :-1]], axis=1)
        source_BS, target_in_BT, target_BT, index_B = map(torch.from_numpy, (source, target_in, target, rows))
        return Batch(source_BS, source_BS != PAD, target_in_BT, target_BT, index_B)


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer, max_length: int | None = None) -> EncodedCorpus:
    """A corpus as ids; with a `max_length`, pairs with an empty or longer side are left out."""
    pairs = list(zip(tokenizer.encode_source(corpus.source), tokenizer.encode_target(corpus.target), strict=True))
    if max_length is None:
        kept = pairs
    else:
        kept = [pair for pair in pairs if all(1 < len(side) <= max_length + 1 for side in pair)]
    return EncodedCorpus(Ragged([s for s, _ in kept]), Ragged([t for _, t in kept]), len(pairs) - len(kept))


def by_budget(width: Integers, tokens: int) -> list[slice]:
    """Cut rows whose widths rise into batches of at most `tokens` tokens, padding included."""
    cuts, start = [], 0
    while start < len(width):
        # Batch sizes that still fit form a prefix, because widths rise.
        candidates = width[start : start + tokens]
        fit = int(np.searchsorted(candidates * np.arange(1, len(candidates) + 1), tokens, side="right"))
        stop = start + max(fit, 1)
        cuts.append(slice(start, stop))
        start = stop
    return cuts


class Batches:
    """Endless training batches; their order is a pure function of (seed, epoch), their state three integers."""

    def __init__(self, corpus: EncodedCorpus, tokens: int, seed: int) -> None:
        self.corpus, self.tokens, self.seed = corpus, tokens, seed
        self.epoch, self.position = 0, 0
        self._width = np.maximum(corpus.source.lengths, corpus.target.lengths)
        self._epoch_rows: tuple[int, list[Integers]] | None = None

    def rows(self, epoch: int) -> list[Integers]:
        """The corpus rows of each batch of an epoch: equal lengths together, in random order."""
        random = np.random.default_rng([self.seed, epoch])
        shuffled = random.permutation(len(self.corpus))
        # Only the longer side is sorted by: stricter orders pad less but let the same sentences meet in every epoch.
        ordered = shuffled[np.argsort(self._width[shuffled], kind="stable")]
        batches = [ordered[cut] for cut in by_budget(self._width[ordered], self.tokens)]
        return [batches[i] for i in random.permutation(len(batches))]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            if self._epoch_rows is None or self._epoch_rows[0] != self.epoch:
                self._epoch_rows = (self.epoch, self.rows(self.epoch))
            rows = self._epoch_rows[1]
            if self.position >= len(rows):
                self.epoch, self.position = self.epoch + 1, 0
                continue
            # Counted before it is handed out: a checkpoint taken after its update starts at the next one.
            self.position += 1
            yield self.corpus.batch(rows[self.position - 1])

    def __len__(self) -> int:
        return len(self.rows(self.epoch))

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]


def in_order(corpus: EncodedCorpus, tokens: int) -> Iterator[Batch]:
    """Every pair once, short ones first: for validation."""
    width = np.maximum(corpus.source.lengths, corpus.target.lengths)
    order = np.argsort(width, kind="stable")
    for cut in by_budget(width[order], tokens):
        yield corpus.batch(order[cut])
