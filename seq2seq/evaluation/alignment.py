"""Attention as word alignment, and its error rate where the true alignment is known.

Shapes: L layers, N heads, T target and S source pieces, W target and X source words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seq2seq.data import toy
from seq2seq.evaluation.metrics import TestSet
from seq2seq.inference.translator import Translation, Translator
from seq2seq.utils.text import WORD_OR_MARK, words_and_marks

Links = frozenset[tuple[int, int]]  # (source word, target word)


def words_of_pieces(pieces: Sequence[str]) -> list[str]:
    """Return the words and punctuation marks that subwords spell."""
    return words_and_marks(_text(pieces))


def _text(pieces: Sequence[str]) -> str:
    return "".join(pieces).replace("▁", " ")


def letter_fractions(pieces: Sequence[str]) -> Tensor:
    """Return the fraction of each piece's letters in each word: pieces × words."""
    words = [match.span() for match in WORD_OR_MARK.finditer(_text(pieces))]
    fraction_PW = torch.zeros(len(pieces), len(words))
    begin = 0
    for p, piece in enumerate(pieces):
        letters = [begin + i for i, letter in enumerate(piece) if letter != "▁"]
        for w, (first, last) in enumerate(words):
            fraction_PW[p, w] = sum(first <= letter < last for letter in letters) / max(1, len(letters))
        begin += len(piece)
    return fraction_PW


def word_weights(weights_TS: Tensor, source_pieces: Sequence[str], target_pieces: Sequence[str]) -> Tensor:
    """Return attention between words: summed over the pieces of a source word, averaged over those of a target word.

    Rows and columns after those of the pieces belong to the end marks and are left out.
    """
    source_SX, target_TW = letter_fractions(source_pieces), letter_fractions(target_pieces)
    weights_TX = weights_TS[..., : len(target_pieces), : len(source_pieces)] @ source_SX
    mean_WT = target_TW.T / target_TW.sum(0).clamp_min(1e-9)[:, None]
    return mean_WT @ weights_TX


def word_attention(translation: Translation) -> Tensor:
    """Return the word attention of every layer and head, L × N × W × X, without the source's end mark."""
    assert translation.weights_LNTS is not None
    return word_weights(translation.weights_LNTS, translation.source_pieces[:-1], translation.pieces)


def links_of(weights_WX: Tensor) -> Links:
    """Link each target word to the source word of highest weight."""
    return frozenset((int(x), w) for w, x in enumerate(weights_WX.argmax(-1))) if weights_WX.numel() else frozenset()


def error_rate(predicted: Iterable[Links], true: Iterable[Links]) -> float:
    """Return the alignment error rate 1 − (|A∩S| + |A∩P|) / (|A| + |S|) (Och & Ney 2003) with all links sure: S = P.

    It then equals one minus the F1 of all links of all sentences.
    """
    both = total = 0
    for ours, theirs in zip(predicted, true, strict=True):
        both += 2 * len(ours & theirs)
        total += len(ours) + len(theirs)
    return 1 - both / max(1, total)


@dataclass(frozen=True)
class AlignmentErrors:
    """Error rates of each head, of the mean of each layer's heads, and of the mean of all."""

    heads: list[list[float]]
    layers: list[float]
    mean: float

    @property
    def best(self) -> tuple[float, int, int]:
        """The lowest rate of a head, with its layer and index from 0."""
        return min((rate, i, j) for i, layer in enumerate(self.heads) for j, rate in enumerate(layer))

    def __str__(self) -> str:
        rate, layer, head = self.best
        if len(self.heads) == len(self.heads[0]) == 1:
            return f"{rate:.3f}"
        return f"best head: {rate:.3f} (layer {layer + 1}, head {head + 1}); mean of all heads: {self.mean:.3f}"


def alignment_of(translator: Translator, test: TestSet) -> AlignmentErrors | None:
    """Return the error rates of a model on a test set; None if the true alignment is unknown."""
    true = known_links(test.source, test.references[0]) if test.grammar else None
    return alignment_errors(translator, test.source, test.references[0], true) if true else None


def known_links(sources: Sequence[str], targets: Sequence[str]) -> list[Links] | None:
    """Return the true links of pairs from the built-in grammar, in either direction; None for other pairs."""
    known = _every_pair()
    pairs = list(zip(sources, targets, strict=True))
    if not all(pair in known for pair in pairs):
        return None
    return [known[pair] for pair in pairs]


def _every_pair() -> dict[tuple[str, str], Links]:
    links_by_pair: dict[tuple[str, str], Links] = {}
    for pair in (pair for split in toy.splits().values() for pair in split):
        links_by_pair[pair.source, pair.target] = frozenset(pair.links)
        links_by_pair[pair.target, pair.source] = frozenset((j, i) for i, j in pair.links)
    return links_by_pair


def alignment_errors(
    translator: Translator, sources: Sequence[str], targets: Sequence[str], true: Sequence[Links]
) -> AlignmentErrors:
    """Return the alignment error rates of each head on known pairs, under teacher forcing."""
    weights = [word_attention(scored) for scored in translator.score(sources, targets, attention=True)]
    layers, heads = weights[0].shape[:2]

    def rate(weights_by_sentence: Iterable[Tensor]) -> float:
        return error_rate(map(links_of, weights_by_sentence), true)

    return AlignmentErrors(
        [[rate(w[layer, head] for w in weights) for head in range(heads)] for layer in range(layers)],
        [rate(w[layer].mean(0) for w in weights) for layer in range(layers)],
        rate(w.mean((0, 1)) for w in weights),
    )
