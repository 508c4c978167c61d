"""Texts as clients send and get them: translations take the positions of their sentences in the text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from seq2seq.inference.streaming import gaps_between
from seq2seq.serving.interface import SentenceResult, TextResult
from seq2seq.utils.text import one_line


def clean(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and tokenizers reject."""
    return text.encode("utf-8", "replace").decode()


def text_result(text: str, sentences: Sequence[SentenceResult]) -> TextResult:
    """Join the best translations as the sentences of the text were joined."""
    gaps = gaps_between(text, (sentence.source for sentence in sentences))
    outputs = [one_line(sentence.translations[0].text) for sentence in sentences]
    for i in range(1, len(sentences)):
        gaps[i] = gaps[i] or _space_after(outputs[i - 1])
    joined = gaps[0] + "".join(output + gap for output, gap in zip(outputs, gaps[1:], strict=True))
    return TextResult(joined, tuple(sentences), tuple(gaps))


def _space_after(sentence: str) -> str:
    """Return what separates it from the next one if nothing did in the source, as in Chinese."""
    return "" if not sentence or unicodedata.east_asian_width(sentence[-1]) in "WF" else " "
