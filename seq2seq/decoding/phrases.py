"""Phrases as finite automata over subword ids, so that a search follows them by table look-ups on any device.

Shapes: S states of a phrase, V vocabulary, C characters of the vocabulary, L characters of the longest piece.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Automaton(NamedTuple):
    """The states of a phrase, from state 0 on, and what each next piece does."""

    next_SV: NDArray[Any]
    banned_2SV: NDArray[Any]  # pieces that may not follow: if others can follow them, and if only END can
    complete_S: NDArray[Any]  # the phrase is in the text, unless a word character follows


class PieceTexts:
    """The texts of all pieces, and their characters as indices."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.characters = sorted(set("".join(texts)))
        index = {character: i for i, character in enumerate(self.characters)}
        padding = len(self.characters)
        self.index_VL = np.full((len(texts), max(map(len, texts), default=0)), padding)
        for row_L, text in zip(self.index_VL, texts, strict=True):
            row_L[: len(text)] = [index[character] for character in text]


class Phrase:
    """One or more words as written; a match inside another word does not count.

    State n < `states` means that the text ends with the first n characters of the phrase, not inside a word. The last
    state of a phrase that begins with a word character means that the text ends inside a word.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.begins_word, self.ends_word = is_word(text[0]), is_word(text[-1])
        body = (r"(?<!\w)" if self.begins_word else "") + re.escape(text)
        self.complete_pattern = re.compile(body + (r"(?!\w)" if self.ends_word else ""))
        self.closed_pattern = re.compile(body + (r"(?=\W)" if self.ends_word else ""))  # whatever follows
        # Only a phrase that ends a word waits for the next character.
        self.longest = len(text) if self.ends_word else len(text) - 1
        inside_word = ["1" if text[0] == "0" else "0"] if self.begins_word else []
        self.states = [*(text[:n] for n in range(self.longest + 1)), *inside_word]  # a text in each state

    def state_after(self, text: str) -> int:
        for n in range(min(self.longest, len(text)), 0, -1):
            inside_word = self.begins_word and is_word(text[:-n][-1:])
            if text.endswith(self.text[:n]) and not inside_word:
                return n
        return self.longest + 1 if self.begins_word and is_word(text[-1:]) else 0

    def forbidden(self, vocabulary: PieceTexts) -> Automaton:
        """Ban the pieces that complete the phrase."""
        next_SV, closed_SV, complete_S = self._pieces(vocabulary)
        # If only END can follow, nothing else will close the phrase.
        return Automaton(next_SV, np.stack((closed_SV, closed_SV | complete_S[next_SV])), complete_S)

    def required(self, vocabulary: PieceTexts, end: int) -> Automaton:
        """Ban END before the phrase is complete; a last state, never left, means that it is closed."""
        next_SV, closed_SV, complete_S = self._pieces(vocabulary)
        S, V = next_SV.shape
        next_SV = np.vstack((np.where(closed_SV, S, next_SV), np.full(V, S)))
        # It may be just complete: the next piece must not make it the beginning of another word.
        banned_SV = np.append(complete_S, False)[:, None] & [is_word(text) for text in vocabulary.texts]
        complete_S = np.append(complete_S, True)
        banned_SV[~complete_S, end] = True
        return Automaton(next_SV, np.stack((banned_SV, banned_SV)), complete_S)

    def _pieces(self, vocabulary: PieceTexts) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the next state, whether the phrase is closed then whatever follows, and whether it is complete."""
        S, V = len(self.states), len(vocabulary.texts)
        next_SC, closed_SC = self._characters(vocabulary.characters)
        next_SV, closed_SV = np.arange(S)[:, None].repeat(V, 1), np.zeros((S, V), bool)
        for index_V in vocabulary.index_VL.T:
            closed_SV |= closed_SC[next_SV, index_V]
            next_SV = next_SC[next_SV, index_V]
        return next_SV, closed_SV, np.array([bool(self.complete_pattern.search(text)) for text in self.states])

    def _characters(self, characters: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the next state and whether the phrase is closed then, by character; a last column changes nothing."""
        # All word characters outside the phrase act alike, and so do all other characters.
        kinds = [c if c in self.text else is_word(c) for c in characters]
        examples = dict(zip(kinds, characters, strict=True))
        kind_C = [list(examples).index(kind) for kind in kinds]
        after = [[text + c for c in examples.values()] for text in self.states]
        next_SX = np.array([[self.state_after(text) for text in row] for row in after])
        closed_SX = np.array([[bool(self.closed_pattern.search(text)) for text in row] for row in after])
        stay_S1 = np.arange(len(self.states))[:, None]
        return np.hstack((next_SX[:, kind_C], stay_S1)), np.hstack((closed_SX[:, kind_C], stay_S1 < 0))


def is_word(character: str) -> bool:
    return bool(re.match(r"\w", character))


def partial_match(ids: Sequence[int], phrase: Sequence[int]) -> int:
    """Return the length of the longest proper prefix of a phrase that ends the ids."""
    lengths = range(min(len(ids), len(phrase) - 1), 0, -1)
    return next((n for n in lengths if list(ids[-n:]) == list(phrase[:n])), 0)


def partial_matches(phrase: Sequence[int], V: int) -> NDArray[Any]:
    """Return, for each number of ids matched so far, the number after each next id."""
    next_SV = np.zeros((len(phrase), V), np.int64)
    for n in range(len(phrase)):
        for id_ in set(phrase):
            next_SV[n, id_] = partial_match([*phrase[:n], id_], phrase)
    return next_SV
