"""Sentences of the grammar as text with word alignment, in splits without a common English sentence."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from seq2seq.data.toy.english import spell_english
from seq2seq.data.toy.german import spell_german
from seq2seq.data.toy.sentences import PATTERNS, Maker
from seq2seq.data.toy.tokens import Dice, Tokens, align
from seq2seq.utils.text import words_and_marks

SIZES = {"train": 20_000, "validation": 500, "test": 500}
LONGEST = 24  # English words and marks


class Pair(NamedTuple):
    """A sentence, its translation, and the word alignment."""

    source: str
    target: str
    links: tuple[tuple[int, int], ...]


@functools.cache
def splits(seed: int = 1) -> dict[str, list[Pair]]:
    """Return the corpus in three parts that share no English sentence."""
    dice = Dice(seed)
    pairs: dict[str, Pair] = {}
    while len(pairs) < sum(SIZES.values()):
        pair = random_pair(dice)
        if len(words_and_marks(pair.source)) <= LONGEST:
            pairs.setdefault(pair.source, pair)
    stream = iter(pairs.values())
    return {split: list(itertools.islice(stream, size)) for split, size in SIZES.items()}


def random_pair(dice: Dice, patterns: Sequence[tuple[Maker, str]] = PATTERNS) -> Pair:
    """Generate one sentence with its translation."""
    maker, mark = dice.pick(patterns)
    english, german = maker(dice)
    final = align(mark, mark)
    source, target = spell_english(english) + final[0], spell_german(german) + final[1]
    target_positions = [(key, j) for j, token in enumerate(target) for key in token.keys]
    links = {(i, j) for i, token in enumerate(source) for key, j in target_positions if key in token.keys}
    return Pair(to_text(source), to_text(target), tuple(sorted(links)))


def to_text(sentence: Tokens) -> str:
    """Return the text of a sentence, with an initial capital and no space before a mark."""
    text = re.sub(r" ([.,?])", r"\1", " ".join(token.text for token in sentence))
    return text[0].upper() + text[1:]
