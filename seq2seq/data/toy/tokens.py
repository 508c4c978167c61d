"""Words that know their translations, and the dice that choose them."""

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Token(NamedTuple):
    """One word of either language with the keys that it shares with its translations."""

    text: str
    keys: tuple[int, ...] = ()


Tokens = tuple[Token, ...]
Sides = tuple[Tokens, Tokens]  # the same in English and German
new_key = itertools.count(1).__next__


def make_tokens(text: str, *keys: int) -> Tokens:
    """The words of a phrase, all carrying the same keys."""
    return tuple(Token(word, keys) for word in text.split())


def joined(pieces: Iterable[Sides]) -> Sides:
    """Concatenate pieces in both languages."""
    english: Tokens = ()
    german: Tokens = ()
    for left, right in pieces:
        english, german = english + left, german + right
    return english, german


def align(english: str, german: str) -> Sides:
    """Link two phrases word by word where they are equally long, otherwise all to all."""
    pairs = list(zip(english.split(), german.split(), strict=False))
    if len(english.split()) != len(german.split()):
        pairs = [(english, german)]
    keyed = [(left, right, new_key()) for left, right in pairs]
    return joined((make_tokens(left, key), make_tokens(right, key)) for left, right, key in keyed)


class Dice:
    """Random choices built on random() alone, whose stream no Python version changes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, all equally likely."""
        return options[int(self.random() * len(options))]
