"""What a score alone does not show, counted by hand, and the alignment error rate as a formula over sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores; a hyphen or apostrophe between two of them joins."""
    found: list[str] = []
    current = ""
    for i, sign in enumerate(text):
        wordlike = sign.isalnum() or sign == "_"
        following = text[i + 1] if i + 1 < len(text) else ""
        if wordlike or (current and sign in "-'’" and (following.isalnum() or following == "_")):
            current += sign
        elif current:
            found.append(current)
            current = ""
    return [*found, current] if current else found


def in_common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Words of both sides, each as often as the side that has it less often."""
    rest, common = list(right), []
    for word in left:
        if word in rest:
            rest.remove(word)
            common.append(word)
    return common


def repetitions(tokens: Sequence[str]) -> int:
    """Positions where one to four words come at once again, and words in which one to four letters come four times."""
    count = 0
    for i in range(len(tokens)):
        for n in (1, 2, 3, 4):
            first, second = list(tokens[i : i + n]), list(tokens[i + n : i + 2 * n])
            count += len(second) == n and first == second
    for token in tokens:
        parts = [token[i : i + n] for i in range(len(token)) for n in (1, 2, 3, 4)]
        count += any(part.isalpha() and part * 4 in token for part in parts if part)
    return count


def length_problems(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[int], list[int], float, float]:
    """The ratio of words, the sentences that repeat, those that break off, and the omitted and the added fraction."""
    repeating, short = [], []
    spoken = asked = common = produced = expected = 0
    for i, hypothesis in enumerate(hypotheses):
        several = [lines[i] for lines in references]
        produced += len(hypothesis.split())
        expected += len(several[0].split())
        if all(repetitions(hypothesis.split()) > repetitions(text.split()) for text in several):
            repeating.append(i)
        if all(Fraction(len(hypothesis.split())) < Fraction(7, 10) * len(text.split()) for text in several):
            short.append(i)
        spoken += len(words(hypothesis))
        asked += len(words(several[0]))
        common += len(in_common(words(hypothesis), words(several[0])))
    omitted = (asked - common) / asked if asked else 1.0
    added = (spoken - common) / spoken if spoken else 1.0
    return (produced / max(expected, 1), repeating, short, omitted, added)


BANDS = ((0, 0), (1, 1), (2, 9), (10, 99), (100, 999), (1000, None))  # the frequencies of each group


def band(count: int) -> int:
    return next(i for i, (_, most) in enumerate(BANDS) if most is None or count <= most)


def word_f1(
    hypotheses: Sequence[str], references: Sequence[str], counts: dict[str, int]
) -> dict[int, tuple[int, float]]:
    """For each band: the words of the references, and the F1 in percent of those that the hypotheses have."""
    common, ours, theirs = ([0] * len(BANDS) for _ in range(3))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for total, found in (
            (common, in_common(words(hypothesis), words(reference))),
            (ours, words(hypothesis)),
            (theirs, words(reference)),
        ):
            for word in found:
                total[band(counts.get(word, 0))] += 1
    return {g: (theirs[g], 100 * 2 * common[g] / (ours[g] + theirs[g])) for g in range(len(BANDS)) if theirs[g]}


def quantile_groups(lengths: Sequence[int], groups: int) -> list[list[int]]:
    """Sentences up to each lower quantile of the lengths and above the one before, groups without any left out."""
    ranked = sorted(lengths)
    edges = sorted({ranked[(len(ranked) - 1) * k // groups] for k in range(1, groups + 1)})
    return [
        [i for i, n in enumerate(lengths) if n <= edge and (not below or n > below[-1])]
        for below, edge in ((edges[:k], edge) for k, edge in enumerate(edges))
    ]


Links = set[tuple[int, int]]


def alignment_error_rate(found: Sequence[Links], sure: Sequence[Links], possible: Sequence[Links]) -> float:
    """1 − (|A∩S| + |A∩P|) / (|A| + |S|) over all sentences (Och & Ney 2003, section 4)."""
    above = below = 0
    for a, s, p in zip(found, sure, possible, strict=True):
        above += sum(link in s for link in a) + sum(link in p for link in a)
        below += len(a) + len(s)
    return 1 - above / below


def word_matrix(weights: Sequence[Sequence[float]], source: Sequence[str], target: Sequence[str]) -> list[list[float]]:
    """Weights between words: summed over the letters of a source word, averaged over a target word by its pieces.

    A piece that spans two words counts in each by the fraction of its letters in it (▁ is a space, not a letter).
    """

    def fractions(pieces: Sequence[str]) -> list[list[float]]:
        text = "".join(pieces).replace("▁", " ")
        spans = [match.span() for match in re.finditer(r"\w+(?:[-'’]\w+)*|[^\w\s]", text)]
        rows, begin = [], 0
        for piece in pieces:
            letters = [begin + i for i in range(len(piece)) if piece[i] != "▁"]
            inside = [sum(a <= i < b for i in letters) for a, b in spans]
            rows.append([count / len(letters) if letters else 0.0 for count in inside])
            begin += len(piece)
        return rows

    of_source, of_target = fractions(source), fractions(target)
    words_source, words_target = len(of_source[0]), len(of_target[0])
    result = []
    for w in range(words_target):
        whole = sum(of_target[t][w] for t in range(len(target)))
        row = []
        for x in range(words_source):
            total = sum(
                of_target[t][w] * weights[t][s] * of_source[s][x]
                for t in range(len(target))
                for s in range(len(source))
            )
            row.append(total / whole)
        result.append(row)
    return result
