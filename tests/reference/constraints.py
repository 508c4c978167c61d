"""Which ids may follow a prefix under constraints, decided on the whole text, and how phrases divide a beam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Prefix = tuple[int, ...]


def is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def occurrences(phrase: str, text: str, closed: bool) -> set[int]:
    """Where a phrase stands in a text, not as a part of another word.

    With `closed` whatever comes after the text must not change that, so a word at the end of the text does not count.
    """
    found, i = set(), text.find(phrase)
    while i >= 0:
        stop = i + len(phrase)
        inside_left = i > 0 and is_word(phrase[0]) and is_word(text[i - 1])
        inside_right = stop < len(text) and is_word(phrase[-1]) and is_word(text[stop])
        not_yet_closed = closed and stop == len(text) and is_word(phrase[-1])
        if not (inside_left or inside_right or not_yet_closed):
            found.add(i)
        i = text.find(phrase, i + 1)
    return found


@dataclass(frozen=True)
class PlainRules:
    pieces: Sequence[str]
    end: int
    required: Sequence[tuple[str, Sequence[int]]] = ()
    forbidden: Sequence[str] = ()
    no_repeat: int = 0
    prefix: Sequence[int] = ()

    def text(self, ids: Sequence[int]) -> str:
        """END ends a word as a space does."""
        return "".join(" " if id_ == self.end else self.pieces[id_].replace("▁", " ") for id_ in ids)

    def filtered(self, ids: Prefix, allowed: list[int], final: bool) -> list[int]:
        """Those of `allowed` that may follow; `final` if only END can come after that."""
        if len(ids) < len(self.prefix):
            return [self.prefix[len(ids)]]
        text, repeated = self.text(ids), self._repeated(ids)
        kept = [id_ for id_ in allowed if id_ not in repeated and not self._breaks(text, id_, final)]
        return kept or [self.end]

    def _repeated(self, ids: Prefix) -> set[int]:
        """The ids that would repeat an n-gram."""
        n = self.no_repeat
        grams = [ids[i : i + n] for i in range(len(ids) - n + 1)] if n else []
        return {gram[-1] for gram in grams if gram[:-1] == ids[len(ids) - n + 1 :]}

    def _breaks(self, text: str, id_: int, final: bool) -> bool:
        """END before a required phrase, a letter that makes it the beginning of another word, or a forbidden phrase."""
        longer = text + self.text([id_])
        for phrase, _ in self.required:
            if occurrences(phrase, text, closed=False):
                at_risk = not occurrences(phrase, text, closed=True)
                if at_risk and len(longer) > len(text) and is_word(longer[len(text)]):
                    return True
            elif id_ == self.end:
                return True
        for phrase in self.forbidden:
            new = occurrences(phrase, longer, closed=not final)
            if new and new - occurrences(phrase, text, closed=True):
                return True
        return False

    # ------------------------------------------------------------------------------------------ required phrases

    def missing(self, ids: Prefix) -> list[Sequence[int]]:
        text = self.text(ids)
        return [phrase for known, phrase in self.required if not occurrences(known, text, closed=False)]

    def begun(self, ids: Prefix, phrase: Sequence[int]) -> int:
        """How many ids of a phrase stand at the end."""
        return max(n for n in range(len(phrase)) if n == 0 or tuple(ids[-n:]) == tuple(phrase[:n]))

    def wanted(self, ids: Prefix) -> set[int]:
        """The first id of each missing phrase, and the next id of what has been begun."""
        return {id_ for phrase in self.missing(ids) for id_ in (phrase[0], phrase[self.begun(ids, phrase)])}

    def progress(self, ids: Prefix) -> int:
        missing = self.missing(ids)
        total = sum(len(phrase) for _, phrase in self.required)
        return total - sum(map(len, missing)) + max((self.begun(ids, phrase) for phrase in missing), default=0)

    def allocated(self, candidates: list[Prefix], K: int, left: int) -> set[Prefix]:
        """K of the candidates (best first): a quota for each degree of progress, the rest to the most complete.

        `left` ids may still come, the last of them END: candidates with too few count only if all have too few.
        """
        total = sum(len(phrase) for _, phrase in self.required)
        progress = {ids: self.progress(ids) for ids in candidates}
        on_time = [ids for ids in candidates if total - progress[ids] < left]
        if not on_time:
            return set(candidates[:K])
        banks = [[ids for ids in on_time if progress[ids] == n] for n in range(total + 1)]
        quota = K // (total + 1)
        chosen = [ids for bank in banks for ids in bank[:quota]]
        for bank in reversed(banks):
            chosen += bank[quota:]
        return set(chosen[:K])
