"""Laws of the shortlist: model 1 is the plain one, lists hold what they must, and a damaged file is named."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from seq2seq.data import shortlist as module
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.shortlist import (
    FILE,
    ITERATIONS,
    SPECIAL_IDS,
    Shortlist,
    coverage,
    find_links,
    learn_shortlist,
    translation_probabilities,
)
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import END, Vocabulary
from seq2seq.utils.errors import UserError

VOCABULARY = Vocabulary(30, 26, joint=False)


def corpus(pairs: int = 40, seed: int = 0) -> EncodedCorpus:
    """Targets repeat their sources' ids in reverse order, modulo 20, with some noise."""
    random = np.random.default_rng(seed)
    sources = [random.integers(4, 30, random.integers(1, 7)).tolist() for _ in range(pairs)]
    targets = [[4 + i % 20 for i in reversed(ids)] + random.integers(4, 26, 1).tolist() for ids in sources]
    source, target = (Ragged.of([[*ids, END] for ids in rows]) for rows in (sources, targets))
    return EncodedCorpus(source, target, np.arange(pairs))


def plain_model_1(pairs: EncodedCorpus) -> dict[tuple[int, int], float]:
    """Brown et al. 1993, §4.1, word by word."""
    sentences = [(pairs.source[i].tolist(), pairs.target[i].tolist()) for i in range(len(pairs))]
    probability: dict[tuple[int, int], float] = defaultdict(lambda: 1.0)
    for _ in range(ITERATIONS):
        count: Counter[tuple[int, int]] = Counter()
        for source, target in sentences:
            for t in target:
                total = sum(probability[s, t] for s in source)
                for s in source:
                    count[s, t] += probability[s, t] / total  # type: ignore[assignment]
        totals: Counter[int] = Counter()
        for (s, _), n in count.items():
            totals[s] += n
        probability = defaultdict(float, {(s, t): n / totals[s] for (s, t), n in count.items()})
    return probability


def test_probabilities_are_those_of_the_plain_model_1() -> None:
    links = find_links(corpus(), VOCABULARY)
    pairs = zip(links.source_P.tolist(), links.target_P.tolist(), strict=True)
    found = dict(zip(pairs, translation_probabilities(links).tolist(), strict=True))
    assert found == pytest.approx(plain_model_1(corpus()))


@pytest.mark.parametrize("count", [1, 3, 200])
def test_a_list_holds_the_likeliest_the_frequent_the_special_and_the_required(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FREQUENT", 2)
    pairs = corpus()
    learned, probability = learn_shortlist(pairs, VOCABULARY), plain_model_1(pairs)
    frequency = Counter(pairs.target.flat.tolist())
    for source in map(pairs.source.__getitem__, range(len(pairs))):
        ids = learned.of(source.tolist(), count, [7]).tolist()
        assert ids == sorted(set(ids)) and {*SPECIAL_IDS, 7} <= set(ids)
        assert all(any(frequency[i] >= frequency[j] for i in ids) for j in frequency)
        for s in source.tolist():
            ranked = sorted((p, t) for (a, t), p in probability.items() if a == s and p > 0)[::-1]
            worst = ranked[:count][-1][0]
            assert {t for p, t in ranked if p > worst * 1.000001} <= set(ids)
    assert learned.of([END], count).size <= count + 2 + len(SPECIAL_IDS)


def test_of_a_large_corpus_as_many_pairs_as_fit_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = find_links(corpus(), VOCABULARY)
    monkeypatch.setattr(module, "MOST_LINKS", len(everything.pair_L) // 2)
    part = find_links(corpus(), VOCABULARY)
    assert 0 < len(part.pair_L) < len(everything.pair_L)


@pytest.mark.parametrize("joint", [True, False])
def test_a_subword_that_training_never_saw_may_stay_as_it_is(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FREQUENT", 2)
    vocabulary = Vocabulary(40, 40, joint)
    learned = learn_shortlist(corpus(), vocabulary)
    assert (35 in learned.of([35], 1)) == joint
    assert not learned.likeliest_SK[35, 1:].any()


def test_coverage_counts_subwords_and_whole_sentences() -> None:
    pairs = corpus(pairs=3)
    always_T = np.zeros(VOCABULARY.target, np.bool_)
    always_T[[*SPECIAL_IDS, *pairs.target[0]]] = True
    found = coverage(Shortlist(np.zeros((VOCABULARY.source, 1), np.int32), always_T), pairs, 1)
    inside = [[t in np.flatnonzero(always_T) for t in pairs.target[i]] for i in range(3)]
    assert found.size == always_T.sum()
    assert found.subwords == pytest.approx(sum(map(sum, inside)) / sum(map(len, inside)))
    assert found.sentences == pytest.approx(sum(map(all, inside)) / 3)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Shortlist.load(tmp_path, VOCABULARY) is None
    learned = learn_shortlist(corpus(), VOCABULARY)
    assert learned.save(tmp_path) == tmp_path / FILE
    loaded = Shortlist.load(tmp_path, VOCABULARY)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.likeliest_SK, learned.likeliest_SK)
    np.testing.assert_array_equal(loaded.always_T, learned.always_T)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("change", ["cut", "text", "source", "target"])
def test_a_damaged_file_is_named(change: str, tmp_path: Path) -> None:
    path = learn_shortlist(corpus(), VOCABULARY).save(tmp_path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif change == "text":
        path.write_text("no archive")
    vocabulary = Vocabulary(30 + (change == "source"), 26 + (change == "target"), joint=False)
    with pytest.raises(UserError, match=r"shortlist\.npz: damaged \(.*\); make it again: seq2seq shortlist run=NAME"):
        Shortlist.load(tmp_path, vocabulary)
