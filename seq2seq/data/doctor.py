"""Checks of a corpus before training on it: each finding has a count, examples and advice."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seq2seq.config.schema import DataConfig
from seq2seq.data.corpus import SIDES, Corpora, Corpus, find_duplicates

Flags = NDArray[np.bool_]
FEW_PAIRS = 1000  # of which no model learns more than the pairs themselves
SAMPLE = 200_000  # sentences used for word statistics
BLOCK_OF_LINES = 250  # pairs whose lengths are compared to detect a shift
BROKEN = re.compile("\ufffd|[ÃÂ][\u0080-\u00bf\u0152-\u02dc\u2013-\u2122]|â€")  # UTF-8 read as Latin-1 or Windows-1252


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    count: int
    fraction: float  # of the pairs examined
    advice: str
    examples: tuple[str, ...]
    serious: bool  # enough to act on before training


def sizes(data: DataConfig, corpora: Corpora, show: Callable[[str, str], Any]) -> None:
    """Show how many pairs each split has, and how they were filtered and split."""
    splits = {"training": corpora.train, "validation": corpora.validation, "test": corpora.test}
    counts = ", ".join(f"{len(corpus):,} {split}" for split, corpus in splits.items() if corpus)
    show("corpus", f"{data.name} {'→'.join(data.languages)}: {counts} pairs")
    for note in corpora.notes:
        show("", note)
    if len(corpora.train) < FEW_PAIRS:
        pairs = f"{len(corpora.train):,} training pairs"
        show(
            "warning", f"{pairs} are very few: the model will hardly translate anything else; a useful one needs 10,000"
        )


def quick(corpora: Corpora) -> list[Finding]:
    """Run the checks that need only stored lengths and hashes, no sentence."""
    train = corpora.train
    return [
        *_overlaps(corpora),
        _finding(
            train,
            "duplicate pairs",
            find_duplicates(train.hashes["source"], train.hashes["target"]),
            "data.filters.duplicate=true keeps one of each",
            0.2,
        ),
        *_shift(train),
    ]


def examine(corpora: Corpora) -> list[Finding]:
    """Run every check, training pairs first."""
    train = corpora.train
    lengths = [train.characters[side] for side in SIDES]
    empty, identical = (np.minimum(*lengths) == 0), train.hashes["source"] == train.hashes["target"]
    return [
        _finding(train, "pairs with an empty side", empty, "data.filters.empty=true removes them", 0.0),
        _finding(train, "identical pairs", identical & ~empty, "data.filters.identical=true removes them", 0.01),
        *quick(corpora),
        *_normalised_overlaps(corpora),
        _finding(
            train,
            "length-ratio outliers",
            _odd_ratio(*lengths),
            "inspect them; data.filters.max_ratio=3 removes them",
            0.01,
        ),
        _finding(
            train,
            "lines far longer than the rest",
            _far_longer(*lengths),
            "data.filters.max_characters=N removes them",
            0.001,
        ),
        *(finding for side in SIDES for finding in _letters(train, side)),
        *_wrong_language(train),
    ]


def _finding(corpus: Corpus, name: str, flags: Flags, advice: str, tolerated: float) -> Finding:
    rows = np.flatnonzero(flags)
    fraction = len(rows) / max(1, len(corpus))
    examples = tuple(_shown(corpus, int(i)) for i in rows[[0, len(rows) // 2]]) if len(rows) else ()
    return Finding(name, len(rows), fraction, advice, tuple(dict.fromkeys(examples)), fraction > tolerated)


def _shown(corpus: Corpus, row: int) -> str:
    sides = (_cut(corpus.source[row]), _cut(corpus.target[row]))
    return f"pair {row + 1:,}: {sides[0]} ⇢ {sides[1]}"


def _cut(text: str, width: int = 48) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------ overlaps


def _held_out(corpora: Corpora) -> Iterator[tuple[str, Corpus]]:
    yield from ((name, corpus) for name in ("validation", "test") if (corpus := getattr(corpora, name)) is not None)


def _overlaps(corpora: Corpora) -> Iterator[Finding]:
    """Find held-out sources that occur verbatim in the training text."""
    for name, corpus in _held_out(corpora):
        flags = np.isin(corpus.hashes["source"], corpora.train.hashes["source"])
        yield _finding(corpus, f"{name} sources seen in training", flags, _LEAK_ADVICE, 0.02)


def _normalised_overlaps(corpora: Corpora) -> Iterator[Finding]:
    """Find the same overlaps, ignoring case, spacing and punctuation."""
    held_out = {name: [_plain(text) for text in corpus.source] for name, corpus in _held_out(corpora)}
    wanted = {text for texts in held_out.values() for text in texts}
    seen = {plain for text in corpora.train.source if (plain := _plain(text)) in wanted}
    for name, corpus in _held_out(corpora):
        flags = np.array([text in seen for text in held_out[name]], bool)
        yield _finding(
            corpus, f"{name} sources seen in training, ignoring case and punctuation", flags, _LEAK_ADVICE, 0.05
        )


_LEAK_ADVICE = "remove them from the training text; otherwise the scores are inflated"
_SIGNS = re.compile(r"[\W_]+")


def _plain(text: str) -> str:
    return _SIGNS.sub(" ", text.lower()).strip()


# ------------------------------------------------------------------------------------------- lengths


def _odd_ratio(source: NDArray[np.int32], target: NDArray[np.int32]) -> Flags:
    """Flag pairs whose log length ratio is far from the corpus median, and at least threefold."""
    full = np.minimum(source, target) > 0
    ratio = np.log(np.maximum(target, 1) / np.maximum(source, 1))
    median = np.median(ratio[full]) if full.any() else 0.0
    spread = np.median(np.abs(ratio[full] - median)) if full.any() else 0.0
    odd: Flags = full & (np.abs(ratio - median) > max(6 * spread, math.log(3)))
    return odd


def _far_longer(source: NDArray[np.int32], target: NDArray[np.int32]) -> Flags:
    longer = np.maximum(source, target)
    far: Flags = longer > 4 * np.percentile(longer, 99)
    return far


def _shift(corpus: Corpus) -> list[Finding]:
    """Find stretches where the lengths of the two sides fit better with one side shifted by a few lines."""
    name, advice = (
        "possibly misaligned pairs",
        "a line is missing or duplicated on one side, just before the first of them",
    )
    source, target = (_standard(np.log1p(corpus.characters[side])) for side in SIDES)
    blocks = len(corpus) // BLOCK_OF_LINES
    if blocks == 0:
        return [_finding(corpus, name, np.zeros(len(corpus), bool), advice, 0.0)]
    offsets = (0, -3, -2, -1, 1, 2, 3)
    correlations = np.stack([_block_means(source * np.roll(target, -offset), blocks) for offset in offsets])
    moved = (correlations.argmax(0) > 0) & (correlations.max(0) > correlations[0] + 0.25)
    # A single block may be chance; a shift continues.
    moved &= np.convolve(moved, [1, 1, 1])[1:-1] >= 2
    flags = np.zeros(len(corpus), bool)
    flags[: blocks * BLOCK_OF_LINES] = np.repeat(moved, BLOCK_OF_LINES)
    return [_finding(corpus, name, flags, advice, 0.0)]


def _standard(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return (values - values.mean()) / max(values.std(), 1e-9)


def _block_means(values: NDArray[np.float64], blocks: int) -> NDArray[np.float64]:
    return values[: blocks * BLOCK_OF_LINES].reshape(blocks, BLOCK_OF_LINES).mean(1)


# ------------------------------------------------------------------------------- scripts and languages


def _letters(corpus: Corpus, side: str) -> Iterator[Finding]:
    """Find sentences mostly in another script than the rest of their side, and text with misread encoding."""
    texts: Sequence[str] = getattr(corpus, side)
    scripts: dict[str, str] = {}

    def script(letter: str) -> str:
        if letter not in scripts:
            scripts[letter] = unicodedata.name(letter, "?").split()[0] if letter.isalpha() else ""
        return scripts[letter]

    everything: Counter[str] = Counter()
    for text in _sample(texts):
        everything.update(text)
    by_script: Counter[str] = Counter()
    for letter, count in everything.items():
        by_script[script(letter)] += count
    del by_script[""]
    expected = {name for name, count in by_script.items() if count > 0.05 * by_script.total()}
    foreign, broken = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
    usual = {letter for letter in everything if script(letter) in expected or not script(letter)}
    for row, text in enumerate(texts):
        broken[row] = BROKEN.search(text) is not None
        if not usual.issuperset(text):
            letters = [script(letter) for letter in text if script(letter)]
            foreign[row] = sum(name not in expected for name in letters) > 0.3 * len(letters)
    shown = ", ".join(sorted(name.lower() for name in expected)) or "no letters"
    yield _finding(corpus, f"{side} lines in another script than {shown}", foreign, "remove them", 0.005)
    yield _finding(
        corpus, f"{side} lines with misread encoding (Ã¼, �)", broken, "decode the file as it was written", 0.0
    )


def _wrong_language(corpus: Corpus) -> Iterator[Finding]:
    """Find sentences in the other side's language, by log odds of words learned from the corpus itself."""
    counts = [
        Counter(word for text in _sample(getattr(corpus, side)) for word in text.lower().split()) for side in SIDES
    ]
    totals = [count.total() + 1 for count in counts]
    odds: dict[str, float] = {}
    for word in counts[0].keys() | counts[1].keys():
        if counts[0][word] + counts[1][word] >= 5:
            frequencies = [(count[word] + 0.5) / total for count, total in zip(counts, totals, strict=True)]
            odds[word] = max(-4.0, min(4.0, math.log(frequencies[0] / frequencies[1])))
    for side, sign in zip(SIDES, (-1, 1), strict=True):
        flags = np.array([_belongs(text, odds, sign) for text in getattr(corpus, side)], bool)
        yield _finding(
            corpus, f"{side} lines in the other language", flags, "remove them: they teach the model to copy", 0.01
        )


def _belongs(text: str, odds: dict[str, float], sign: int) -> bool:
    """Whether at least three words have odds, on average clear ones, in favour of the other side."""
    log_odds = [sign * odds[word] for word in text.lower().split() if word in odds]
    return len(log_odds) >= 3 and sum(log_odds) > 1.0 * len(log_odds)


def _sample(texts: Sequence[str]) -> Iterator[str]:
    step = max(1, len(texts) // SAMPLE)
    return (texts[i] for i in range(0, len(texts), step))


# --------------------------------------------------------------------------------------------- page


def page(findings: list[Finding], show: Callable[[str, str], Any]) -> None:
    """Show the findings, serious ones first, with advice and examples; then the checks that found nothing."""
    for finding in sorted(findings, key=lambda finding: not finding.serious):
        if finding.count:
            name = "PROBLEM" if finding.serious else "minor"
            show(name, f"{finding.name}: {finding.count:,} ({finding.fraction:.2%}); {finding.advice}")
            for example in finding.examples:
                show("", f"  {example}")
    absent = "; ".join(finding.name for finding in findings if not finding.count)
    for i, line in enumerate(textwrap.wrap(absent, 100)):
        show("" if i else "none", line)
