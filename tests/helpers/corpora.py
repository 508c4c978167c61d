"""Small corpora and batches: random ids, and a language that a tiny model can learn."""

from __future__ import annotations

import random
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from seq2seq.data import toy
from seq2seq.data.batching import Batches
from seq2seq.data.encoding import Batch, EncodedCorpus
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import END, PAD
from seq2seq.data.toy import corpus as grammar

WORDS = {
    "cat": "Katze",
    "dog": "Hund",
    "sees": "sieht",
    "red": "rote",
    "two": "zwei",
    "and": "und",
    "old": "alte",
    "now": "jetzt",
}


def random_sentences(lengths: list[int], seed: int = 0, vocabulary: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(END + 1, vocabulary, (n,), generator=generator).tolist(), END] for n in lengths]


def random_corpus(lengths: list[int], seed: int = 0) -> EncodedCorpus:
    sides = random_sentences(lengths, seed), random_sentences([n + 1 for n in reversed(lengths)], seed + 1)
    return EncodedCorpus(Ragged.of(sides[0]), Ragged.of(sides[1]), np.arange(len(lengths)))


def drawn(batches: Batches, count: int) -> list[Batch]:
    """The batches of the next `count` updates."""
    return [batch for rank_batches in islice(batches, count) for batch in rank_batches.micro_batches]


def padded(sentences: list[list[int]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as one matrix and its mask, with `extra` more columns of padding."""
    width = max(map(len, sentences)) + extra
    ids = torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in sentences])
    return ids, ids != PAD


def tiny_batch(lengths: list[int] | None = None, seed: int = 0) -> Batch:
    corpus = random_corpus(lengths or [3, 5, 2, 7], seed)
    return corpus.batch(torch.arange(len(corpus)).numpy())


def write_corpus(folder: Path, name: str, count: int, seed: int) -> tuple[str, str]:
    """A word-for-word language, so that a tiny model can learn all of it."""
    chance = random.Random(seed)
    sentences = [chance.choices(list(WORDS), k=chance.randint(1, 8)) for _ in range(count)]
    for side, translate in (("en", str), ("de", WORDS.__getitem__)):
        (folder / f"{name}.{side}").write_text(
            "".join(" ".join(map(translate, s)) + "\n" for s in sentences), encoding="utf-8"
        )
    return f"{name}.en", f"{name}.de"


@cache
def small_grammar(seed: int = 1) -> dict[str, list[toy.Pair]]:
    """The built-in corpus with a tenth of its pairs: drawing all of them takes two seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "SIZES", {"train": 2000, "validation": 60, "test": 60})
        return grammar.splits.__wrapped__(seed)
