"""Words and lines of a text."""

from __future__ import annotations

import re

WORD = re.compile(r"\w+(?:[-'’]\w+)*")  # hyphens and apostrophes stay inside
WORD_OR_MARK = re.compile(rf"{WORD.pattern}|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Return the words of a text, without punctuation."""
    return WORD.findall(text)


def words_and_marks(text: str) -> list[str]:
    """Return the words and punctuation marks of a text."""
    return WORD_OR_MARK.findall(text)


def one_line(text: str) -> str:
    """Join the lines of a translation: byte subwords can spell line ends."""
    return " ".join(text.splitlines())
