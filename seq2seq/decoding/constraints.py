"""Lexical constraints: required words, forbidden words and given prefixes.

Shapes: B sentences, K hypotheses of each, R rows, T target positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

NEG_INF = float("-inf")
SPACE = "▁"  # sentencepiece's word boundary


class Rules:
    """Constraints on hypotheses; every result depends only on the ids generated so far."""

    def __init__(
        self,
        pieces: Sequence[str],
        end: int,
        required: Sequence[tuple[str, list[int]]] = (),
        forbidden: Sequence[str] = (),
        no_repeat: int = 0,
    ) -> None:
        # The end of a sentence ends a word as a space does.
        self.texts = [" " if id_ == end else piece.replace(SPACE, " ") for id_, piece in enumerate(pieces)]
        self.end, self.no_repeat = end, no_repeat
        self.prefixes: Sequence[list[int]] = ()
        self.required = [(Phrase(text), ids) for text, ids in required]
        self.forbidden = [Phrase(text) for text in forbidden]
        self.inside_word = [id_ for id_, text in enumerate(self.texts) if re.match(r"\w", text)]
        self._completing = lru_cache(maxsize=4096)(self._completing_after)

    def for_prefixes(self, prefixes: Sequence[list[int]]) -> Rules:
        """Return the same rules for a batch whose sentences begin with these prefixes."""
        rules = copy(self)
        rules.prefixes = prefixes
        return rules

    def min_lengths(self) -> list[int]:
        """Return the minimum number of ids that each sentence of the batch needs."""
        required = sum(len(ids) for _, ids in self.required)
        return [len(prefix) + required for prefix in self.prefixes]

    # ------------------------------------------------------------------------------ allowed next ids

    def ban(self, logits_RV: Tensor, raw_RV: Tensor, prefix_RT: Tensor, sentence_R: Tensor, final_R: Tensor) -> None:
        """Set ids that may not follow `prefix_RT`, which starts with BEGIN, to −∞; after `final_R` only END can."""
        if self.no_repeat:
            ban_repeats(logits_RV, prefix_RT[:, 1:], self.no_repeat)
        if self.forbidden or self.required:
            for row, (ids, final) in enumerate(zip(prefix_RT[:, 1:].tolist(), final_R.tolist(), strict=True)):
                logits_RV[row, self._banned_after(self._text(ids), final)] = NEG_INF
        no_choice_R = logits_RV.amax(-1) == NEG_INF
        logits_RV[no_choice_R, self.end] = raw_RV[no_choice_R, self.end].float()
        if any(self.prefixes):
            self._force_prefixes(logits_RV, raw_RV, prefix_RT.shape[1] - 1, sentence_R.tolist())

    def _force_prefixes(self, logits_RV: Tensor, raw_RV: Tensor, position: int, sentence_R: list[int]) -> None:
        """Allow only the next id of each incomplete prefix."""
        prefixes = [(row, self.prefixes[s]) for row, s in enumerate(sentence_R)]
        forced = [(row, prefix[position]) for row, prefix in prefixes if position < len(prefix)]
        if forced:
            rows, ids = (torch.tensor(column) for column in zip(*forced, strict=True))
            logits_RV[rows] = NEG_INF
            logits_RV[rows, ids] = raw_RV[rows, ids].float()

    def _banned_after(self, text: str, final: bool) -> list[int]:
        banned: list[int] = []
        for phrase, _ in self.required:
            if not phrase.complete_pattern.search(text):
                banned.append(self.end)
            elif not phrase.closed_pattern.search(text):
                # It is just complete: the next piece must not make it the beginning of another word.
                banned += self.inside_word
        for phrase in self.forbidden:
            banned += self._completing(phrase, phrase.tail(text), final)
        return banned

    def _completing_after(self, phrase: Phrase, tail: str, final: bool) -> list[int]:
        """Return the pieces that complete the phrase after a text with this tail."""
        pattern = phrase.complete_pattern if final else phrase.closed_pattern
        return [id_ for id_, piece in enumerate(self.texts) if pattern.search(tail + piece)]

    def _text(self, ids: list[int]) -> str:
        return "".join(self.texts[id_] for id_ in ids)

    # --------------------------------------------- required words: dynamic beam allocation (Post & Vilar 2018)

    def next_required_ids(self, prefix_RT: Tensor) -> list[list[int]]:
        """Return for each row the ids that begin or continue a required phrase it still lacks."""
        return [self._next_required_ids(ids) for ids in prefix_RT[:, 1:].tolist()]

    def _next_required_ids(self, ids: list[int]) -> list[int]:
        missing = [phrase for known, phrase in self.required if not known.complete_pattern.search(self._text(ids))]
        return sorted({id_ for phrase in missing for id_ in (phrase[0], phrase[partial_match(ids, phrase)])})

    def progress(self, ids: list[int]) -> int:
        """Count the ids of required phrases generated so far: complete phrases, and the one in progress."""
        text = self._text(ids)
        completed = [bool(known.complete_pattern.search(text)) for known, _ in self.required]
        finished = sum(len(phrase) for (_, phrase), complete in zip(self.required, completed, strict=True) if complete)
        return finished + max(
            (
                partial_match(ids, phrase)
                for (_, phrase), complete in zip(self.required, completed, strict=True)
                if not complete
            ),
            default=0,
        )

    def allocate(
        self, scores: Tensor, ids: Tensor, origin: Tensor, prefix_BKT: Tensor, remaining_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the K candidates of each sentence that continue: the best of every degree of progress.

        Also return which of them are mere fillers.
        """
        K = prefix_BKT.shape[1]
        columns = (x.tolist() for x in (scores, ids, origin, prefix_BKT[:, :, 1:], remaining_B))
        pairs = [
            self._allocate([(s, prefix[k], i) for s, i, k in zip(*candidates, strict=True)], remaining, K)
            for *candidates, prefix, remaining in zip(*columns, strict=True)
        ]
        chosen_BK, filler_BK = (torch.tensor(part, device=scores.device) for part in zip(*pairs, strict=True))
        return chosen_BK, filler_BK

    def _allocate(
        self, candidates: list[tuple[float, list[int], int]], remaining: int, K: int
    ) -> tuple[list[int], list[bool]]:
        total = sum(len(phrase) for _, phrase in self.required)
        banks: dict[int, list[int]] = {}
        seen: set[tuple[int, ...]] = set()
        too_late: list[int] = []
        fillers: list[int] = []
        for index in sorted(range(len(candidates)), key=lambda c: -candidates[c][0]):
            score, prefix, id_ = candidates[index]
            generated_ids = (*prefix, id_)
            if id_ == self.end or generated_ids in seen or score == NEG_INF:
                fillers.append(index)
                continue
            seen.add(generated_ids)
            progress = self.progress(list(generated_ids))
            # A last resort: candidates that cannot add all that is missing, and end, within the length limit.
            (banks.setdefault(progress, []) if total - progress < remaining else too_late).append(index)
        quota = K // (total + 1)
        chosen = [index for bank in banks.values() for index in bank[:quota]]
        # The rest goes to the candidates with the most progress.
        chosen += chain(*(banks[progress][quota:] for progress in sorted(banks, reverse=True)))
        chosen = sorted((chosen or too_late)[:K], key=lambda c: -candidates[c][0])
        empty = K - len(chosen)
        return chosen + fillers[:1] * empty, [False] * len(chosen) + [True] * empty


class Phrase:
    """One or more words as written; a match inside another word does not count."""

    def __init__(self, text: str) -> None:
        self.text = text
        body = (r"(?<!\w)" if re.match(r"\w", text) else "") + re.escape(text)
        self.at_word = bool(re.search(r"\w$", text))
        self.complete_pattern = re.compile(body + (r"(?!\w)" if self.at_word else ""))
        self.closed_pattern = re.compile(body + (r"(?=\W)" if self.at_word else ""))  # whatever follows

    def tail(self, text: str) -> str:
        """Return the end of a text that decides what completes the phrase, and the character before it."""
        longest = len(self.text) if self.at_word else len(self.text) - 1
        # The preceding character counts only if the phrase begins with a word; "!" must not match again.
        before = 1 if re.match(r"\w", self.text) else 0
        for n in range(min(longest, len(text)), 0, -1):
            if self.text.startswith(text[-n:]):
                return text[max(0, len(text) - n - before) :]
        return text[-1:] if before else ""


def partial_match(ids: Sequence[int], phrase: Sequence[int]) -> int:
    """Return the length of the longest proper prefix of a phrase that ends the ids."""
    lengths = range(min(len(ids), len(phrase) - 1), 0, -1)
    return next((n for n in lengths if list(ids[-n:]) == list(phrase[:n])), 0)


def ban_repeats(logits_RV: Tensor, prefix_RT: Tensor, n: int) -> None:
    """Set ids that would repeat an n-gram to −∞."""
    if prefix_RT.shape[1] < n:
        return
    seen_RXn = prefix_RT.unfold(1, n, 1)
    tail_R1n = prefix_RT[:, None, prefix_RT.shape[1] - n + 1 :]
    row_R, position_R = (seen_RXn[:, :, : n - 1] == tail_R1n).all(-1).nonzero(as_tuple=True)
    logits_RV[row_R, seen_RXn[row_R, position_R, n - 1]] = NEG_INF
