"""Sentence pairs as token ids: encoded once per tokenizer, memory-mapped, and padded into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from seq2seq.data.corpus import Corpus, Status
from seq2seq.data.store import BLOCK, Integers, Ragged, Writer, key_of, open_array
from seq2seq.data.tokenizer import BEGIN, PAD, SubwordSampling, Tokenizer
from seq2seq.utils.io import build_once


def shifted_right(target_BT: Tensor) -> Tensor:
    """The decoder's input that predicts these targets: BEGIN, then all but the last."""
    return F.pad(target_BT[:, :-1], (1, 0), value=BEGIN)


@dataclass(frozen=True)
class Batch:
    """Padded pairs; `target_in` begins with BEGIN, `target_out` is the token to predict at each position."""

    source_BS: Tensor
    source_mask_BS: Tensor
    target_in_BT: Tensor
    target_out_BT: Tensor
    index_B: Tensor  # the pairs' indices in the corpus
    source_index_M: Tensor  # flat index of each real token: computed before a GPU would have to synchronise
    target_index_M: Tensor

    @classmethod
    def of(cls, source_BS: Tensor, target_BT: Tensor, index_B: Tensor) -> Batch:
        """Build a batch from ids padded on the right."""
        # END occurs in target_in only where target_out is padding, which the loss ignores.
        target_in_BT = shifted_right(target_BT)
        source_mask_BS = source_BS != PAD
        source_M, target_M = (mask.flatten().nonzero().squeeze(1) for mask in (source_mask_BS, target_BT != PAD))
        return cls(source_BS, source_mask_BS, target_in_BT, target_BT, index_B, source_M, target_M)

    @property
    def target_mask_BT(self) -> Tensor:
        return self.target_out_BT != PAD

    @property
    def target_tokens(self) -> int:
        return len(self.target_index_M)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {name: x.to(device, non_blocking=True) for name, x in self.tensors.items()}
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Copy to memory from which a GPU copies without waiting."""
        pinned: dict[str, Any] = {name: x.pin_memory() for name, x in self.tensors.items()}
        return replace(self, **pinned)


@dataclass(frozen=True)
class EncodedCorpus:
    """Pairs as ids, each side with its END; `dropped` counts the pairs left out as empty or too long."""

    source: Ragged
    target: Ragged
    rows: Integers  # each pair's index in the corpus
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def width(self) -> NDArray[np.int32]:
        """The length of the longer side of each pair."""
        return np.maximum(self.source.lengths(), self.target.lengths())

    def batch(self, rows: Integers) -> Batch:
        arrays = (self.source.padded(rows, PAD), self.target.padded(rows, PAD), self.rows[rows].astype(np.int64))
        return Batch.of(*map(torch.from_numpy, arrays))


def encode_corpus(corpus: Corpus, tokenizer: Tokenizer) -> EncodedCorpus:
    """Encode all pairs in memory: for validation."""
    source, target = tokenizer.encode_source(corpus.source[:]), tokenizer.encode_target(corpus.target[:])
    return EncodedCorpus(Ragged.of(source), Ragged.of(target), np.arange(len(source)))


def encode_training(
    corpus: Corpus, tokenizer: Tokenizer, max_length: int, cache: str, status: Status = lambda _: None
) -> tuple[EncodedCorpus, bool]:
    """Return memory-mapped ids, cached per corpus, tokenizer and limit, and whether the cache had them."""
    folder = Path(cache) / f"ids-{key_of(corpus.fingerprint, *tokenizer.models.values(), max_length)}"
    dtype = np.uint16 if max(tokenizer.vocabulary.source, tokenizer.vocabulary.target) < 2**16 else np.int32

    def build(tmp_dir: Path) -> None:
        writers = [Writer(tmp_dir, side, dtype) for side in ("source", "target")]
        with open(tmp_dir / "rows.int32", "wb") as rows:
            for start in range(0, len(corpus), BLOCK):
                block = slice(start, start + BLOCK)
                sides = tokenizer.encode_source(corpus.source[block]), tokenizer.encode_target(corpus.target[block])
                selected = [i for i, pair in enumerate(zip(*sides, strict=True)) if within_limit(pair, max_length)]
                for writer, side in zip(writers, sides, strict=True):
                    writer.extend([side[i] for i in selected])
                rows.write((np.array(selected, np.int32) + start).astype(np.int32).tobytes())
                status(f"encoding the corpus: {start + len(sides[0]):,} of {len(corpus):,} pairs …")
        for writer in writers:
            writer.close()

    cached = build_once(folder, build)
    source, target = Ragged.open(folder, "source"), Ragged.open(folder, "target")
    return EncodedCorpus(source, target, open_array(folder / "rows.int32"), len(corpus) - len(source)), cached


def within_limit(pair: tuple[Sequence[int], Sequence[int]], max_length: int) -> bool:
    """Whether both sides, with END, are non-empty and within the limit."""
    return all(1 < len(side) <= max_length + 1 for side in pair)


Resegment = Callable[[Integers, str], EncodedCorpus]  # rows of the encoded corpus, seed → the same pairs, resegmented


def resegmenter(
    corpus: Corpus, encoded: EncodedCorpus, tokenizer: Tokenizer, rate: float, max_length: int
) -> Resegment:
    """Return a function that resegments a pool's pairs, once per epoch and identically in every process."""

    def resegment(rows: Integers, key: str) -> EncodedCorpus:
        corpus_rows = encoded.rows[rows]
        seed = int(key, 16) % 2**31
        source = tokenizer.encode_source([corpus.source[int(i)] for i in corpus_rows], SubwordSampling(rate, seed))
        target = tokenizer.encode_target([corpus.target[int(i)] for i in corpus_rows], SubwordSampling(rate, seed + 1))
        for i, pair in enumerate(zip(source, target, strict=True)):
            if not within_limit(pair, max_length):  # fall back on the plain segmentation, which keeps to it
                source[i], target[i] = (side[int(rows[i])].tolist() for side in (encoded.source, encoded.target))
        return EncodedCorpus(Ragged.of(source), Ragged.of(target), corpus_rows)

    return resegment
