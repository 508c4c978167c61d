"""Shortlists: the target subwords that those of a source translate to, as IBM model 1 learns them from training pairs.

Shapes: S source and T target vocabulary, K target subwords of a source subword, U ids of a shortlist; L links between
the subwords of a pair's two sides, P distinct pairs of subwords.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.store import Integers
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, Vocabulary
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import write_atomically

FILE = "shortlist.npz"
MOST = 200  # likeliest target subwords kept of each source subword
FREQUENT = 100  # most frequent target subwords
SPECIAL_IDS = (PAD, UNKNOWN, BEGIN, END)
ITERATIONS = 5
MOST_LINKS = 30_000_000  # of the pairs to learn from: about a gigabyte
DAMAGE = (OSError, EOFError, ValueError, TypeError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Shortlist:
    likeliest_SK: NDArray[np.int32]  # best first, padded with PAD
    always_T: NDArray[np.bool_]  # frequent and special subwords, which every shortlist has

    def of(self, source: Sequence[int], count: int, required: Sequence[int] = ()) -> Integers:
        """Return the target ids for a source, ascending: `count` of each subword, those of `always`, and `required`."""
        inside_T = self.always_T.copy()
        inside_T[self.likeliest_SK[list(source), :count]] = True
        inside_T[list(required)] = True
        return np.flatnonzero(inside_T)

    def save(self, folder: Path) -> Path:
        """Write the file of a checkpoint atomically."""
        content = io.BytesIO()
        np.savez_compressed(content, **asdict(self))
        write_atomically(folder / FILE, content.getvalue())
        return folder / FILE

    @classmethod
    def load(cls, folder: Path, vocabulary: Vocabulary) -> Shortlist | None:
        """Load the file of a checkpoint; None if there is none."""
        path = folder / FILE
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                found = cls(stored["likeliest_SK"], stored["always_T"])
            sizes = len(found.likeliest_SK), len(found.always_T)
            if sizes != (vocabulary.source, vocabulary.target) or found.likeliest_SK.max() >= vocabulary.target:
                raise ValueError("of another vocabulary")
        except DAMAGE as error:
            raise UserError(f"{path}: damaged ({error}); make it again: seq2seq shortlist run=NAME") from None
        return found


class Links(NamedTuple):
    """All links of some pairs: each target token may translate each source token of its sentence."""

    token_L: NDArray[np.int32]  # number of the target token
    pair_L: NDArray[np.int32]  # number of its pair of subwords
    source_P: Integers
    target_P: Integers


def learn_shortlist(corpus: EncodedCorpus, vocabulary: Vocabulary) -> Shortlist:
    """Learn translation probabilities by IBM model 1 (Brown et al. 1993, §4.1), and keep the likeliest subwords."""
    links = find_links(corpus, vocabulary)
    probability_P = translation_probabilities(links)
    likeliest_SK = np.full((vocabulary.source, MOST), PAD, np.int32)
    if vocabulary.joint:  # subwords that training never saw, of names for example, stay as they are
        likeliest_SK[:, 0] = np.arange(vocabulary.source)
    order_P = np.lexsort((-probability_P, links.source_P))
    source_P = links.source_P[order_P]
    rank_P = np.arange(len(source_P)) - np.searchsorted(source_P, source_P)
    kept_P = rank_P < MOST
    likeliest_SK[source_P[kept_P], rank_P[kept_P]] = links.target_P[order_P][kept_P]
    frequency_T = np.bincount(np.asarray(corpus.target.flat), minlength=vocabulary.target)
    always_T = np.zeros(vocabulary.target, np.bool_)
    always_T[np.argsort(-frequency_T, kind="stable")[:FREQUENT]] = True
    always_T[list(SPECIAL_IDS)] = True
    return Shortlist(likeliest_SK, always_T)


def find_links(corpus: EncodedCorpus, vocabulary: Vocabulary) -> Links:
    """List the links of all pairs, or of as many as fit, taken at equal distances."""
    total = int((corpus.source.lengths().astype(np.int64) * corpus.target.lengths()).sum())
    rows = range(0, len(corpus), max(1, -(-total // MOST_LINKS)))
    sources, targets = ([side[i].astype(np.int64) for i in rows] for side in (corpus.source, corpus.target))
    first = np.cumsum([0, *map(len, targets)])
    pairs = zip(sources, targets, strict=True)
    key_L = np.concatenate([np.add.outer(s * vocabulary.target, t).ravel() for s, t in pairs])
    tokens = (np.tile(np.arange(a, b), len(s)) for s, a, b in zip(sources, first, first[1:], strict=False))
    token_L = np.concatenate([*tokens]).astype(np.int32)
    key_P, pair_L = np.unique(key_L, return_inverse=True)
    return Links(token_L, pair_L.astype(np.int32), *np.divmod(key_P, vocabulary.target))


def translation_probabilities(links: Links) -> NDArray[np.float64]:
    """Return the probability of each pair's target subword given its source subword, after a few iterations of EM."""
    probability_P = np.ones(len(links.source_P))
    for _ in range(ITERATIONS):
        weight_L = probability_P[links.pair_L]
        weight_L /= np.bincount(links.token_L, weight_L)[links.token_L]
        count_P = np.bincount(links.pair_L, weight_L)
        probability_P = count_P / np.bincount(links.source_P, count_P)[links.source_P]
    return probability_P


class Coverage(NamedTuple):
    size: float  # mean length of a shortlist
    subwords: float  # fraction of reference subwords inside
    sentences: float  # fraction of references that are inside as a whole


def coverage(shortlist: Shortlist, corpus: EncodedCorpus, count: int) -> Coverage:
    """Measure how much of the references the shortlists of their sources contain."""
    lists = [shortlist.of(source.tolist(), count) for source in map(corpus.source.__getitem__, range(len(corpus)))]
    inside = [np.isin(corpus.target[i], ids) for i, ids in enumerate(lists)]
    whole = float(np.mean([row.all() for row in inside]))
    return Coverage(float(np.mean([*map(len, lists)])), float(np.concatenate(inside).mean()), whole)
