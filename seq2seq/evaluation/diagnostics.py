"""Diagnostics beyond a corpus score: lengths, repetition, omissions, and groups of sentences and words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from seq2seq.evaluation.metrics import TestSet, measure
from seq2seq.utils.text import words_of

# -------------------------------------------------------------------------------- beyond the score


@dataclass(frozen=True)
class Group:
    """Sentences or words of a test set with a common property."""

    label: str
    count: int
    value: float


def subset(test: TestSet, rows: Sequence[int]) -> TestSet:
    picked = [[lines[i] for i in rows] for lines in (test.source, *test.references)]
    return replace(test, source=picked[0], references=picked[1:])


def grouped_score(
    name: str, hypotheses: Sequence[str], test: TestSet, groups: Iterable[tuple[str, Sequence[int]]]
) -> list[Group]:
    """Return the corpus score of each non-empty group of sentences."""
    return [
        Group(label, len(rows), measure(name, [hypotheses[i] for i in rows], subset(test, rows)).value)
        for label, rows in groups
        if len(rows)
    ]


def length_groups(source: Sequence[str], groups: int = 5) -> list[tuple[str, list[int]]]:
    """Group sentences by length in words, in groups of about equal size."""
    lengths = np.array([len(text.split()) for text in source])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, groups + 1)[1:], method="lower"))
    group_of = np.searchsorted(edges, lengths)
    labelled = []
    for group in range(len(edges)):
        rows = np.flatnonzero(group_of == group)
        least, most = lengths[rows].min(), lengths[rows].max()
        labelled.append((f"{least}" if least == most else f"{least}–{most}", rows.tolist()))
    return labelled


FREQUENCIES = (0, 1, 9, 99, 999)  # the highest training frequency of each group's words


def frequency_label(group: int) -> str:
    if group == len(FREQUENCIES):
        return f"{FREQUENCIES[-1] + 1:,} or more"
    least, most = (FREQUENCIES[group - 1] + 1 if group else 0), FREQUENCIES[group]
    return f"{least:,}–{most:,}" if least < most else f"{most:,}" if most else "never"


def by_target_frequency(hypotheses: Sequence[str], references: Sequence[str], counts: Counter[str]) -> list[Group]:
    """Return word F1 by training frequency, with matches clipped to the count on each side."""
    common, hypothesis_words, reference_words = (np.zeros(len(FREQUENCIES) + 1, int) for _ in range(3))
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = Counter(words_of(hypothesis)), Counter(words_of(reference))
        for total, words in ((common, ours & theirs), (hypothesis_words, ours), (reference_words, theirs)):
            for word, times in words.items():
                total[np.searchsorted(FREQUENCIES, counts[word])] += times
    f1 = 200 * common / np.maximum(1, hypothesis_words + reference_words)
    return [
        Group(frequency_label(g), int(reference_words[g]), float(f1[g])) for g in range(len(f1)) if reference_words[g]
    ]


def source_frequency_groups(source: Sequence[str], counts: Counter[str]) -> list[tuple[str, list[int]]]:
    """Group sentences by the training frequency of their rarest word."""
    rarest = np.array([min((counts[word] for word in words_of(text)), default=0) for text in source])
    group_of = np.searchsorted(FREQUENCIES, rarest)
    return [(frequency_label(g), np.flatnonzero(group_of == g).tolist()) for g in range(len(FREQUENCIES) + 1)]


def count_words(sentences: Iterable[str]) -> Counter[str]:
    return Counter(word for text in sentences for word in words_of(text))


@dataclass(frozen=True)
class OutputErrors:
    """Errors of length, repetition and omission in translations."""

    ratio: float  # output words / words of the first reference
    repeating: list[int]  # sentences with more immediate repetitions than any reference
    short: list[int]  # sentences with under 70 % of the words of the shortest reference
    omitted: float  # fraction of the first reference's words missing in the output, with multiplicity
    added: float  # fraction of the output's words missing in the first reference

    def __str__(self) -> str:
        return f"ratio {self.ratio:.3f}; {len(self.repeating):,} repetitive, {len(self.short):,} too short"


def output_errors(hypotheses: Sequence[str], test: TestSet) -> OutputErrors:
    hypothesis_words = [hypothesis.split() for hypothesis in hypotheses]
    reference_words = [[text.split() for text in several] for several in zip(*test.references, strict=True)]
    total = sum(len(several[0]) for several in reference_words)
    common = sum(
        sum((Counter(words_of(hypothesis)) & Counter(words_of(reference))).values())
        for hypothesis, reference in zip(hypotheses, test.references[0], strict=True)
    )
    hypothesis_total, reference_total = (
        sum(len(words_of(text)) for text in side) for side in (hypotheses, test.references[0])
    )
    return OutputErrors(
        sum(map(len, hypothesis_words)) / max(1, total),
        [
            i
            for i, words in enumerate(hypothesis_words)
            if repetitions(words) > max(map(repetitions, reference_words[i]))
        ],
        [i for i, words in enumerate(hypothesis_words) if len(words) < 0.7 * min(map(len, reference_words[i]))],
        1 - common / max(1, reference_total),
        1 - common / max(1, hypothesis_total),
    )


def repetitions(words: Sequence[str], longest: int = 4) -> int:
    """Count immediate repetitions of one to four words, and words with letters four times in a row."""
    repeated_letters = sum(bool(re.search(r"([^\W\d_]{1,4})\1{3}", word)) for word in words)
    return repeated_letters + sum(
        words[i : i + n] == words[i + n : i + 2 * n]
        for n in range(1, longest + 1)
        for i in range(len(words) - 2 * n + 1)
    )
