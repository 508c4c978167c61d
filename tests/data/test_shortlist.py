"""Laws of shortlists: what IBM model 1 finds likeliest, frequent subwords, and what a translation must contain."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from seq2seq.data import shortlist as module
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.shortlist import SPECIAL_IDS, Shortlist, coverage, find_links, learn_shortlist
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import PAD, Vocabulary

Pair = tuple[list[int], list[int]]
SOURCES, TARGETS = 14, 17  # the last ones of either side occur in no pair


def random_pairs(seed: int, count: int = 40) -> list[Pair]:
    """Pairs in which a target id tends to follow from its source id, also twice in one sentence."""
    random = np.random.default_rng(seed)
    sources = [random.integers(4, SOURCES - 2, random.integers(1, 6)).tolist() for _ in range(count)]
    return [(s, [4 + (i + int(random.integers(3))) % (TARGETS - 6) for i in s]) for s in sources]


def encoded(pairs: Sequence[Pair]) -> EncodedCorpus:
    source, target = (Ragged.of([pair[side] for pair in pairs]) for side in (0, 1))
    return EncodedCorpus(source, target, np.arange(len(pairs)))


def model_1(pairs: Sequence[Pair]) -> dict[tuple[int, int], float]:
    """The probability of a target id given a source id, as in Brown et al. (1993), pair by pair."""
    t: dict[tuple[int, int], float] = defaultdict(lambda: 1.0)
    for _ in range(module.ITERATIONS):
        count: dict[tuple[int, int], float] = defaultdict(float)
        total: dict[int, float] = defaultdict(float)
        for source, target in pairs:
            for f in target:
                whole = sum(t[e, f] for e in source)
                for e in source:
                    count[e, f] += t[e, f] / whole
                    total[e] += t[e, f] / whole
        t = {(e, f): count[e, f] / total[e] for e, f in count}
    return t


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_those_of_model_1(seed: int) -> None:
    pairs = random_pairs(seed)
    links = find_links(encoded(pairs), Vocabulary(SOURCES, TARGETS, False))
    found = module.translation_probabilities(links)
    expected = model_1(pairs)
    keys = [(int(e), int(f)) for e, f in zip(links.source_P, links.target_P, strict=True)]
    assert sorted(keys) == sorted(expected)
    assert found == pytest.approx([expected[key] for key in keys])


@pytest.mark.parametrize("joint", [False, True])
def test_the_likeliest_subwords_come_first(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are kept; a subword that training never saw stays itself, if both sides share a vocabulary."""
    monkeypatch.setattr(module, "MOST", 3)
    pairs, targets = random_pairs(7), SOURCES if joint else TARGETS
    pairs = [(s, [min(i, targets - 3) for i in t]) for s, t in pairs]
    learned, t = learn_shortlist(encoded(pairs), Vocabulary(SOURCES, targets, joint)), model_1(pairs)
    seen = {i for source, _ in pairs for i in source}
    assert seen and len(seen) < SOURCES
    for source in range(SOURCES):
        ids = [i for i in learned.likeliest_SK[source].tolist() if i != PAD]
        if source not in seen:
            assert ids == ([source] if joint and source != PAD else [])
            continue
        found = [t[source, i] for i in ids]
        best = sorted((p for (e, _), p in t.items() if e == source), reverse=True)
        assert len(set(ids)) == len(ids) and found == pytest.approx(best[: module.MOST])


def test_the_most_frequent_and_the_special_subwords_are_in_every_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREQUENT", 4)
    pairs = random_pairs(2)
    learned = learn_shortlist(encoded(pairs), Vocabulary(SOURCES, TARGETS, False))
    counts = Counter(i for _, target in pairs for i in target)
    always = set(np.flatnonzero(learned.always_T).tolist())
    assert always >= set(SPECIAL_IDS)
    frequent = always - set(SPECIAL_IDS)
    assert len(frequent) == 4 and min(counts[i] for i in frequent) >= max(counts[i] for i in counts if i not in always)


def test_a_list_is_what_its_source_and_its_constraints_ask_for() -> None:
    """In order, without repetition, and the same whatever was asked for before."""
    learned = learn_shortlist(encoded(random_pairs(4)), Vocabulary(SOURCES, TARGETS, False))
    always = set(np.flatnonzero(learned.always_T[:6]).tolist())
    learned = Shortlist(learned.likeliest_SK, np.isin(np.arange(TARGETS), list(always)))
    outside = TARGETS - 1
    for count in (1, 2):
        for source in ([5], [5, 6, 5], [8, 4]):
            expected = always | {int(i) for s in source for i in learned.likeliest_SK[s, :count]}
            assert learned.of(source, count).tolist() == sorted(expected)
            assert outside not in expected
            assert learned.of(source, count, [outside]).tolist() == sorted({*expected, outside})
            assert learned.of(source, count).tolist() == sorted(expected)


def test_coverage_counts_what_the_lists_hold() -> None:
    """Of subwords and of whole sentences; the size is the mean of the lists'."""
    likeliest_SK = np.zeros((8, 1), np.int32)
    likeliest_SK[4:, 0] = [4, 5, 6, 7]
    learned = Shortlist(likeliest_SK, np.arange(9) < 4)
    corpus = encoded([([4, 5], [4, 5, 3]), ([6], [6, 7])])
    assert coverage(learned, corpus, 1) == pytest.approx((5.5, 4 / 5, 1 / 2))
