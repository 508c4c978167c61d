"""Laws of corpora: sources of every form, filters, splits, and caches that change with all that matters and no more."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from seq2seq.cli.main import load_config
from seq2seq.config.schema import DataConfig, ExtraCorpusConfig, FilterConfig
from seq2seq.data import corpus as module
from seq2seq.data import toy
from seq2seq.data.corpus import Corpora, Corpus, filter_pairs, load_split, open_corpora, store
from seq2seq.data.sources import PairStream, find_stream, from_hub, kind_of, misaligned_line, read_lines
from seq2seq.data.store import blocks
from seq2seq.utils.errors import UserError
from tests.reference import corpora as reference

LAW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
NUMBERS = itertools.count()  # of stores
Pair = tuple[str, str]
NONE = FilterConfig(empty=False, identical=False, duplicate=False, max_ratio=0, max_characters=0)


@lru_cache
def base() -> DataConfig:
    data: DataConfig = load_config("train", "data=files", "data.train=x.tsv").data
    return dataclasses.replace(data, source="en", target="de", filters=NONE, held_out=2)


def data_of(cache: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(base(), cache=str(cache), **changes)


def write(path: Path, lines: Sequence[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def table(path: Path, pairs: Sequence[Sequence[str]], columns: Sequence[str] = ("en", "de")) -> str:
    return write(path, ["\t".join(row) for row in (columns, *pairs)])


def numbered(count: int, name: str = "") -> list[Pair]:
    return [(f"{name} source {i}", f"{name} target {i}") for i in range(count)]


def pairs_of(corpus: Corpus | None) -> list[Pair]:
    return list(zip(corpus.source, corpus.target, strict=True)) if corpus is not None else []


def stored(pairs: Sequence[Pair], cache: Path) -> module.StoredPairs:
    return store(PairStream((next(NUMBERS),), lambda: iter(pairs)), str(cache))


# ------------------------------------------------------------------------------------------- filters

TEXTS = st.sampled_from(["", " ", "a", "b", "ab", " ab", "ab ", "abc", "äöü", "abcdef", "日本", "\u3000a", "abcdefghi"])
WORDS = {
    "empty": "with an empty side removed",
    "characters": "characters removed",
    "ratio": "with a length ratio over",
    "identical": "with identical sides removed",
    "duplicate": "that repeat an earlier pair removed",
}


@LAW
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=25),
    st.fixed_dictionaries(
        {
            "empty": st.booleans(),
            "identical": st.booleans(),
            "duplicate": st.booleans(),
            "max_ratio": st.sampled_from([0, 1, 1.5, 2, 3, 9]),
            "max_characters": st.sampled_from([0, 1, 2, 3, 6, 8, 9]),
        }
    ),
)
def test_filters_keep_and_count_what_a_plain_loop_does(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair], chosen: dict[str, Any]
) -> None:
    """Limits are inclusive, each pair counts under the first filter that drops it, the first of its kind stays."""
    rows, notes = filter_pairs(stored(pairs, tmp_path_factory.getbasetemp() / "filters"), FilterConfig(**chosen))
    expected, counts = reference.filtered(pairs, **chosen)
    assert rows.tolist() == expected
    assert len(notes) == len(counts)
    for note, (count, name) in zip(notes, counts, strict=True):
        assert note.startswith(f"{count:,} pairs ") and WORDS[name] in note, note


@pytest.mark.parametrize(
    ("changes", "pairs", "kept"),
    [
        ({"max_characters": 3}, [("abc", "a"), ("a", "abcd"), (" abc ", "a"), ("abcd", "a")], [0, 2]),
        ({"max_ratio": 2}, [("ab", "abcd"), ("ab", "abcde"), ("", "ab"), ("", "abc"), ("abcde", "ab")], [0, 2]),
        ({"max_ratio": 1.5}, [("ab", "abc"), ("abcd", "ab")], [0]),
        ({"empty": True}, [("a", " "), ("\u3000", "a"), ("a", "b"), ("", "")], [2]),
        ({"identical": True}, [("a", "a"), ("a", "a "), ("", ""), ("A", "a")], [1, 3]),
        ({"duplicate": True}, [("a", "b"), ("a", "b"), ("b", "a"), ("a", "c"), ("c", "b"), ("a", "b")], [0, 2, 3, 4]),
        ({"duplicate": True, "empty": True}, [("", "b"), ("", "b"), ("a", "b")], [2]),
        ({}, [("", ""), ("a", "a"), ("a", "a"), ("a", "a" * 99)], [0, 1, 2, 3]),
    ],
)
def test_each_filter_at_its_limit(changes: dict[str, Any], pairs: list[Pair], kept: list[int], tmp_path: Path) -> None:
    """A limit itself is allowed, spaces around a sentence are no characters, and nothing is filtered unasked."""
    rows, _ = filter_pairs(stored(pairs, tmp_path), dataclasses.replace(NONE, **changes))
    assert rows.tolist() == kept


def test_a_corpus_is_stored_as_it_stands_with_lengths_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across blocks: sentences, their characters without outer spaces, and equal hashes for equal sentences alone."""
    monkeypatch.setattr(module, "blocks", lambda pairs: blocks(pairs, 3))
    pairs = [("a ", "x"), ("", "a "), ("ä日", "x"), ("x", " "), ("a", "y"), ("a ", "x"), ("z", "\u2028q\x0b")]
    found = stored(pairs, tmp_path)
    corpus = found.corpus()
    assert pairs_of(corpus) == pairs and len(found) == len(corpus) == 7
    hashes = [int(corpus.hashes[side][i]) for side in ("source", "target") for i in range(7)]
    texts = [pair[side] for side in (0, 1) for pair in pairs]
    for (a, one), (b, two) in itertools.combinations(zip(hashes, texts, strict=True), 2):
        assert (a == b) == (one == two), (one, two)
    assert corpus.characters["source"].tolist() == [len(s.strip()) for s, _ in pairs]
    assert corpus.characters["target"].tolist() == [len(t.strip()) for _, t in pairs]
    part = found.corpus(np.array([4, 1]), "c", (1, 2))
    assert pairs_of(part) == [pairs[4], pairs[1]] and (part.fingerprint, part.corpus_ends) == ("c", (1, 2))
    assert part.hashes["target"].tolist() == [hashes[7 + 4], hashes[7 + 1]]
    assert part.characters["source"].tolist() == [1, 0]


# ------------------------------------------------------------------------------------------- splits


def opened(folder: Path, pairs: Sequence[Pair], seed: int = 1, **changes: Any) -> Corpora:
    folder.mkdir(exist_ok=True)
    train = table(folder / f"t{next(NUMBERS)}.tsv", pairs)
    return open_corpora(data_of(folder / "cache", train=train, **changes), seed)


def sizes(corpora: Corpora) -> list[int]:
    return [len(c) if c is not None else -1 for c in (corpora.train, corpora.validation, corpora.test)]


@pytest.mark.parametrize(
    ("count", "held_out", "held"),
    [(10, 5, 1), (39, 5, 1), (40, 5, 2), (59, 5, 2), (60, 5, 3), (100, 5, 5), (119, 5, 5), (120, 5, 5), (100, 1, 1)],
)
def test_what_is_held_out_is_the_number_asked_for_and_at_most_a_twentieth(
    count: int, held_out: int, held: int, tmp_path: Path
) -> None:
    """For each of both sets, of what the filters leave; at least one pair."""
    corpora = opened(tmp_path, numbered(count), held_out=held_out)
    assert sizes(corpora) == [count - 2 * held, held, held]
    assert corpora.notes == (
        f"{held:,} validation and {held:,} test pairs held out of the training pairs "
        "(seed 1; equal sources stay in one split)",
    )
    empty = dataclasses.replace(NONE, empty=True)
    filtered_first = opened(tmp_path, [*numbered(count), *[("", "x")] * 60], held_out=held_out, filters=empty)
    assert sizes(filtered_first) == [count - 2 * held, held, held]
    assert filtered_first.notes[0] == "60 pairs with an empty side removed"


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 25), min_size=50, max_size=120), st.integers(1, 8), st.integers(0, 9))
def test_a_split_is_a_partition_that_keeps_equal_sources_together(
    tmp_path_factory: pytest.TempPathFactory, names: list[int], held_out: int, seed: int
) -> None:
    """No part exceeds its number, and none lacks a whole group; groups over the number stay; pairs keep their order."""
    pairs = [(f"s{name}", f"t{i}") for i, name in enumerate(names)]
    pairs += [(f"u{i}", f"v{i}") for i in range(4)]
    rows = np.arange(len(pairs) + 3)[3:]
    found = stored([("skipped", "x")] * 3 + pairs, tmp_path_factory.getbasetemp() / "splits")
    held = max(1, min(held_out, len(pairs) // 20))
    groups = [sum(source == name for source, _ in pairs) for name in dict.fromkeys(source for source, _ in pairs)]
    fitting = [n for n in groups if n <= held]
    if sum(fitting) <= held:
        with pytest.raises(UserError, match="too few distinct sentences"):
            module.split_held_out(found, rows, held_out, 2, seed)
        return
    train, parts = module.split_held_out(found, rows, held_out, 2, seed)
    again = module.split_held_out(found, rows, held_out, 2, seed)
    assert train.tolist() == again[0].tolist() and [p.tolist() for p in parts] == [p.tolist() for p in again[1]]
    assert sorted([*train, *parts[0], *parts[1]]) == rows.tolist()
    everything = [("skipped", "x")] * 3 + pairs
    of_part = [{everything[row][0] for row in part} for part in (train, *parts)]
    assert not any(a & b for a, b in itertools.combinations(of_part, 2))
    assert all(1 <= len(part) <= held for part in parts)
    if sum(fitting) >= 3 * held:
        assert all(len(part) > held - max(fitting) for part in parts)
    for part in (train, *parts):
        assert part.tolist() == sorted(part)
    for row in itertools.chain(*parts):
        assert sum(source == everything[row][0] for source, _ in pairs) <= held


def test_a_split_is_drawn_from_all_of_the_corpus_by_its_seed(tmp_path: Path) -> None:
    """Another seed holds out other pairs; validation and test are not alike."""
    found = [opened(tmp_path, numbered(200), seed, held_out=10) for seed in (1, 2, 3)]
    held = [frozenset(pairs_of(c)) for corpora in found for c in (corpora.validation, corpora.test)]
    assert len(set(held)) == 6
    for left, right in itertools.combinations(held, 2):
        assert len(left & right) <= 4
    for part in held:
        positions = sorted(int(source.split()[-1]) for source, _ in part)
        assert positions[0] < 100 <= positions[-1], "not one end of the corpus"


def test_too_few_different_sources_cannot_be_split(tmp_path: Path) -> None:
    """Two sets need two groups that are small enough, and more than fill the first; one set needs one."""
    twice = [("a", str(i)) for i in range(30)]
    with pytest.raises(UserError, match="too few distinct sentences"):
        opened(tmp_path, [*twice, ("b", "b")])
    frequent = [("a", str(i)) for i in range(960)]
    with pytest.raises(UserError, match="too few distinct sentences"):
        opened(tmp_path, [*frequent, *numbered(40)], held_out=50)
    test = table(tmp_path / "test.tsv", numbered(2))
    assert sizes(opened(tmp_path, [*twice, ("b", "b")], test=test)) == [30, 1, 2]
    assert sizes(opened(tmp_path, [*twice, ("b", "b"), ("c", "c")])) == [30, 1, 1]


def test_named_sets_are_read_and_only_missing_ones_split_off(tmp_path: Path) -> None:
    """With validation pairs named nothing is split off; with a test set alone, only validation is."""
    named: dict[str, Any] = {
        split: table(tmp_path / f"{split}.tsv", numbered(3, split)) for split in ("validation", "test")
    }
    pairs = numbered(60)
    empty = dataclasses.replace(NONE, empty=True)
    both = opened(tmp_path, pairs, **named)
    assert pairs_of(both.train) == pairs and both.notes == ()
    assert pairs_of(both.validation) == numbered(3, "validation") and pairs_of(both.test) == numbered(3, "test")
    one = opened(tmp_path, pairs, validation=named["validation"])
    assert sizes(one) == [60, 3, -1] and one.test is None and one.notes == ()
    other = opened(tmp_path, pairs, test=named["test"])
    assert sizes(other) == [58, 2, 3] and pairs_of(other.test) == numbered(3, "test")
    assert other.notes == (
        "2 validation pairs held out of the training pairs (seed 1; equal sources stay in one split)",
    )
    dirty = table(tmp_path / "dirty.tsv", [("", "a"), ("b", "b")])
    unfiltered = opened(tmp_path, pairs, validation=dirty, filters=empty)
    assert pairs_of(unfiltered.validation) == [("", "a"), ("b", "b")], "filters are for training pairs"


def test_where_nothing_is_left_the_setting_to_loosen_is_named(tmp_path: Path) -> None:
    """Neither training nor validation continues without a pair."""
    valid = table(tmp_path / "v.tsv", numbered(2))
    with pytest.raises(UserError, match="no training pairs remain"):
        opened(tmp_path, [("", "")], validation=valid, filters=dataclasses.replace(NONE, empty=True))
    with pytest.raises(UserError, match=r"^data: no training pairs remain; loosen data\.filters"):
        opened(tmp_path, [("", "")] * 5, filters=dataclasses.replace(NONE, empty=True))
    nothing = table(tmp_path / "n.tsv", [])
    with pytest.raises(UserError, match=r"n\.tsv: no pairs found"):
        opened(tmp_path, numbered(3), validation=nothing)


def test_parts_end_where_each_corpus_ends_after_filters_and_splits(tmp_path: Path) -> None:
    """A mix counts the pairs that are left of each corpus, in the order of `train` and `more`."""
    lists = [numbered(n, name) for n, name in ((30, "a"), (25, "b"), (20, "c"))]
    for part in lists:
        part[3] = part[7] = ("", "x")
    names = [table(tmp_path / f"{i}.tsv", part) for i, part in enumerate(lists)]
    sides = [write(tmp_path / f"c.{i}", [pair[i] for pair in lists[2]]) for i in (0, 1)]
    more = [ExtraCorpusConfig(names[1], weight=3), ExtraCorpusConfig(sides)]
    filters = dataclasses.replace(NONE, empty=True)
    data = data_of(tmp_path / "cache", train=names[0], extra=more, filters=filters, held_out=3)
    corpora = open_corpora(data, 1)
    kept = [pair for part in lists for pair in part if pair[0]]
    held = {*pairs_of(corpora.validation), *pairs_of(corpora.test)}
    assert len(held) == 6 and pairs_of(corpora.train) == [pair for pair in kept if pair not in held]
    count = [sum(source.startswith(name) for source in corpora.train.source) for name in "abc"]
    assert corpora.train.corpus_ends == tuple(itertools.accumulate(count))
    assert corpora.train.corpus_ends[-1] == len(corpora.train)
    alone = open_corpora(dataclasses.replace(data, extra=[]), 1)
    assert alone.train.corpus_ends == (len(alone.train),)


def test_further_corpora_are_read_from_the_folder_of_their_own_entry(tmp_path: Path) -> None:
    """Neither the folder nor the revision of the first corpus is theirs; columns are."""
    folder = tmp_path / "more"
    (folder / "sub").mkdir(parents=True)
    table(folder / "train.tsv", numbered(4, "all"))
    table(folder / "sub" / "train.tsv", numbered(4, "sub"))
    first = tmp_path / "first"
    first.mkdir()
    table(first / "train.tsv", numbered(4, "first"))
    table(first / "validation.tsv", numbered(2))
    more = [ExtraCorpusConfig("train", path=str(folder), subset="sub")]
    data = data_of(
        tmp_path / "c", path=str(first), train="train", validation="validation", extra=more, source="de", target="en"
    )
    expected = [(t, s) for s, t in numbered(4, "first") + numbered(4, "sub")]
    assert pairs_of(open_corpora(data, 1).train) == expected
    within = more[0].within(dataclasses.replace(data, revision="r", subset="x"))
    assert (within.revision, within.subset, within.path, within.train) == (None, "sub", str(folder), "train")


def test_one_split_alone_is_the_one_that_training_has(tmp_path: Path) -> None:
    """Named ones are read without the training pairs; the others as training splits them off."""
    pairs, named = numbered(60), table(tmp_path / "v.tsv", numbered(3, "v"))
    train = table(tmp_path / "t.tsv", pairs)
    data = data_of(tmp_path / "c", train=train, held_out=2)
    corpora = open_corpora(data, 5)
    for split in ("train", "validation", "test"):
        assert pairs_of(load_split(data, split, 5)) == pairs_of(getattr(corpora, split))
    assert pairs_of(load_split(data, "test", 6)) != pairs_of(corpora.test)
    alone = data_of(tmp_path / "other", train=None, validation=named)
    assert pairs_of(load_split(alone, "validation", 1)) == numbered(3, "v")
    assert load_split(alone, "test", 1) is None and load_split(alone, "train", 1) is None
    with_test = dataclasses.replace(data, validation=named)
    assert load_split(with_test, "test", 1) is None
    assert pairs_of(load_split(with_test, "train", 1)) == pairs
    assert pairs_of(load_split(with_test, "validation", 1)) == numbered(3, "v")


# ------------------------------------------------------------------------------------------- caches


def summary(corpora: Corpora) -> tuple[Any, ...]:
    """All that a later step may depend on."""
    parts = [pairs_of(c) for c in (corpora.train, corpora.validation, corpora.test)]
    test = corpora.test is None
    return (*parts, test, corpora.notes, corpora.train.fingerprint, corpora.train.corpus_ends)


def variants(folder: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Settings that each change something but the first, with their seeds."""
    rows = [(f"s{i % 50}", f"t{i % 55}", f"f{i}") for i in range(60)] + [("", "x", "y"), ("same", "same", "z")]
    rows += [("s1", "t1", "q"), ("a", "a" * 30, "b")]
    a = table(folder / "a.tsv", rows, ("en", "de", "fr"))
    b = table(folder / "b.tsv", numbered(45, "b"))
    v = table(folder / "v.tsv", numbered(4, "v"))
    plain = [write(folder / f"x.{i}", [row[i] for row in rows[5:]]) for i in (0, 1)]
    below = folder / "tree" / "sub"
    below.mkdir(parents=True)
    table(folder / "tree" / "train.tsv", numbered(41, "whole"))
    table(below / "train.tsv", numbered(42, "part"))

    def filters(**changes: Any) -> dict[str, Any]:
        return {"train": a, "filters": dataclasses.replace(NONE, **changes)}

    return {
        "base": ({"train": a}, 1),
        "seed": ({"train": a}, 2),
        "held_out": ({"train": a, "held_out": 1}, 1),
        "held_out more": ({"train": a, "held_out": 3}, 1),
        "empty": (filters(empty=True), 1),
        "identical": (filters(identical=True), 1),
        "duplicate": (filters(duplicate=True), 1),
        "ratio": (filters(max_ratio=5), 1),
        "larger ratio": (filters(max_ratio=29), 1),
        "characters": (filters(max_characters=4), 1),
        "fewer characters": (filters(max_characters=2), 1),
        "turned": ({"train": a, "source": "de", "target": "en"}, 1),
        "another target": ({"train": a, "target": "fr"}, 1),
        "another source": ({"train": a, "source": "fr"}, 1),
        "validation": ({"train": a, "validation": v}, 1),
        "test": ({"train": a, "test": v}, 1),
        "both": ({"train": a, "validation": v, "test": b}, 1),
        "exchanged": ({"train": a, "validation": b, "test": v}, 1),
        "another file": ({"train": b}, 1),
        "plain files": ({"train": plain}, 1),
        "plain files turned": ({"train": plain[::-1]}, 1),
        "more": ({"train": a, "extra": [ExtraCorpusConfig(b)]}, 1),
        "more and more": ({"train": a, "extra": [ExtraCorpusConfig(b), ExtraCorpusConfig(v)]}, 1),
        "in another order": ({"train": a, "extra": [ExtraCorpusConfig(v), ExtraCorpusConfig(b)]}, 1),
        "the other first": ({"train": b, "extra": [ExtraCorpusConfig(a)]}, 1),
        "folder": ({"path": str(folder / "tree"), "train": "train"}, 1),
        "subset": ({"path": str(folder / "tree"), "train": "train", "subset": "sub"}, 1),
    }


def test_a_warm_cache_gives_what_an_empty_one_gives_for_every_setting(tmp_path: Path) -> None:
    """Each setting has a result of its own, whatever was cached before it, and the same when it is read again."""
    chosen = variants(tmp_path)
    cold = {}
    for number, (name, (changes, seed)) in enumerate(chosen.items()):
        cold[name] = summary(open_corpora(data_of(tmp_path / f"cold{number}", **changes), seed))
    for left, right in itertools.combinations(cold, 2):
        assert cold[left] != cold[right], f"{left} and {right} do not differ"
    for _ in range(2):
        for name, (changes, seed) in chosen.items():
            assert summary(open_corpora(data_of(tmp_path / "warm", **changes), seed)) == cold[name], name


def test_the_fingerprint_changes_with_every_sentence_and_with_nothing_else(tmp_path: Path) -> None:
    """What is trained on such pairs is found by it: file, cache and format do not count, pairs and their order do."""
    valid = table(tmp_path / "v.tsv", numbered(2))

    def fingerprint(pairs: Sequence[Pair], folder: str = "c") -> str:
        return opened(tmp_path / folder, pairs, validation=valid).train.fingerprint

    pairs = numbered(5)
    changed = [
        [*pairs[:i], new, *pairs[i + 1 :]] for i in (0, 2, 4) for new in (("x", pairs[i][1]), (pairs[i][0], "x"))
    ]
    changed += [pairs[:4], pairs[1:], [*pairs, pairs[0]], pairs[::-1], [(t, s) for s, t in pairs], pairs[1:2] * 5]
    changed += [[(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1]), *pairs[2:]]]
    fingerprints = [fingerprint(pairs), *map(fingerprint, changed)]
    assert len(set(fingerprints)) == len(fingerprints)
    assert fingerprint(pairs) == fingerprint(pairs, "other") == fingerprints[0]
    dropped = opened(
        tmp_path / "c", [*pairs, ("", "")], validation=valid, filters=dataclasses.replace(NONE, empty=True)
    )
    assert dropped.train.fingerprint == fingerprints[0]


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_settings_that_change_no_pair_use_the_cache(tmp_path: Path) -> None:
    """Lengths in subwords, temperature and weights come later; seed and number held out count for a split alone."""
    chosen = variants(tmp_path)
    cache = tmp_path / "cache"
    train = chosen["base"][0]["train"]
    more = chosen["more"][0]["extra"]
    named = chosen["both"][0]
    for changes in ({"train": train}, {"train": train, "extra": more}, named):
        open_corpora(data_of(cache, **changes), 1)
    made = folders(cache)
    for changes in ({"max_length": 7}, {"temperature": 5.0}, {"name": "other"}, {"revision": "r"}):
        open_corpora(data_of(cache, train=train, **changes), 1)
    open_corpora(data_of(cache, train=train, extra=[dataclasses.replace(more[0], weight=9.0)]), 1)
    open_corpora(data_of(cache, **{**named, "held_out": 1}), 7)
    relative = os.path.relpath(train)
    open_corpora(data_of(cache, train=relative), 1)
    assert folders(cache) == made
    open_corpora(data_of(cache, train=train), 2)
    assert len(folders(cache)) == len(made) + 1, "another seed makes other rows of the same store"


@pytest.mark.parametrize("kind", ["table", "plain", "mixed"])
def test_a_file_of_the_same_size_and_time_is_read_again_when_it_was_written(kind: str, tmp_path: Path) -> None:
    """Tools that restore a file's time do not hide that its content changed; nor does a mix or the second file."""
    valid = table(tmp_path / "v.tsv", numbered(2))
    paths = [tmp_path / "a.tsv", tmp_path / "b.de"]

    def files(letter: str) -> dict[str, Any]:
        if kind == "plain":
            write(paths[1], [letter] * 3)
            return {"train": [write(tmp_path / "a.en", "xyz"), str(paths[1])]}
        table(paths[0], [("x", letter)])
        other = {"train": table(tmp_path / "o.tsv", [("o", "o")]), "extra": [ExtraCorpusConfig(str(paths[0]))]}
        return other if kind == "mixed" else {"train": str(paths[0])}

    path = paths[kind == "plain"]
    found = []
    for letter in "pq":
        changes = files(letter)
        os.utime(path, ns=(10**18, 10**18))
        found.append(pairs_of(open_corpora(data_of(tmp_path / "c", validation=valid, **changes), 1).train)[-1][1])
    assert found == ["p", "q"]


# ------------------------------------------------------------------------------------------- sources


def compressed(path: Path, content: bytes) -> Path:
    compress: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress
    }  # fmt: skip
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


def read(path: Path, **changes: Any) -> list[Pair]:
    return list(find_stream(data_of(path.parent, **changes), str(path)).pairs())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tsv", ".tsv"), ("a.CSV", ".csv"), ("a.jsonl.gz", ".jsonl"), ("a.json.ZST", ".json"),
        ("a.parquet", ".parquet"),
        ("a.tsv.gz.xz", ".tsv"), ("a.en", None), ("a.tsv.en", None), ("a.en.gz", None), ("tsv", None), ("a.gz", None),
        (".tsv", None), ("a.b.tsv", ".tsv"), ("a.tsv.bz2", ".tsv"),
    ],
)  # fmt: skip
def test_a_table_is_known_by_the_end_of_its_name_before_archives(name: str, kind: str | None) -> None:
    """Whatever the case; other names are plain text."""
    assert kind_of(Path(name)) == kind


@pytest.mark.parametrize("archive", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_archives_of_several_parts_are_read_to_their_end(archive: str, tmp_path: Path) -> None:
    """Compressed files that were joined are one file; large ones come back whole."""
    lines = [f"{i} {'x' * (i % 50)}" for i in range(6000)]
    halves = ["".join(f"{line}\n" for line in part).encode() for part in (lines[:4000], lines[4000:])]
    path = tmp_path / f"a.txt{archive}"
    whole = b"".join(compressed(tmp_path / f"p{archive}", half).read_bytes() for half in halves)
    path.write_bytes(whole)
    assert list(read_lines(path)) == lines
    if archive:
        path.write_bytes(whole[:-8])
        before = 0
        with pytest.raises(UserError) as error:
            for line in read_lines(path):
                assert line == lines[before]
                before += 1
        assert f"truncated or damaged after line {before:,} (" in str(error.value) and "(None)" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        ({}, ["a.tsv", "b.de"], "a pair of files must be plain text"),
        ({}, ["a.en", "b.tsv"], "a pair of files must be plain text"),
        ({}, "a.en", "a single file must be a table"),
        ({}, "a.zip", "a.zip: .zip files cannot be read; unpack it"),
        ({}, ["a.en", "a.de.ZIP"], "a.de.ZIP: .zip files cannot be read; unpack it"),
        ({}, "a.tar.gz", "a.tar.gz: .tar files cannot be read; unpack it"),
        ({}, "a.xlsx", "a.xlsx: .xlsx files cannot be read; save the sheet as .csv"),
        ({}, "none.tsv", "none.tsv: cannot be read (No such file"),
        ({}, ["none.en", "a.en"], "none.en: cannot be read (No such file"),
        ({}, "folder.tsv", "folder.tsv: this is a folder; give a file"),
        ({"path": "a.en"}, "train", "data.path: a.en is a file, not a folder; use data.train=a.en"),
        ({"path": "./none"}, "train", "data.path: ./none is not a folder"),
        ({"path": "a/b/c"}, "train", "data.path: a/b/c is not a folder"),
        ({"path": "folder.tsv"}, "train", "folder.tsv contains neither a table (.jsonl"),
        ({"target": "fr"}, "a.tsv", "a.tsv, line 2: no column fr; possible: en, de"),
        ({}, "number.jsonl", "number.jsonl, line 1, column de: 5 is not text"),
        ({}, "first.csv", "first.csv, line 2: 1 columns, but the header has 2: en, de"),
        ({}, "semicolons.csv", "has 1: en;de; the first line of a table must name its columns, such as en and de, sep"),
        ({}, "words.csv", "possible: en;de; the first line of a table must name its columns, such as en and de, sep"),
        ({}, "second.csv", "second.csv, line 3: 3 columns, but the header has 2: en, de"),
        ({}, "open.csv", "open.csv, line 2: invalid CSV"),
        ({}, "header.csv", "header.csv, line 1: invalid CSV"),
        ({}, "bad.jsonl", "bad.jsonl, line 2, column 8: not one JSON object per line"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_what_cannot_be_read_is_named_with_its_line(
    changes: dict[str, Any], where: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, folders and columns that are not what the config takes them for; the first row as any other."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.tsv").mkdir()
    write(tmp_path / "a.en", ["x"])
    table(tmp_path / "a.tsv", [("a", "b")])
    write(tmp_path / "number.jsonl", ['{"en": "a", "de": 5}'])
    write(tmp_path / "first.csv", ["en,de", "a", "b,c"])
    write(tmp_path / "semicolons.csv", ["en;de", "a, b;c"])
    write(tmp_path / "words.csv", ["en;de", "a;b"])
    write(tmp_path / "second.csv", ["en,de", "a,b", "a,b,c"])
    write(tmp_path / "open.csv", ["en,de", '"a', "b"])
    write(tmp_path / "header.csv", ['"en,de', "b"])
    write(tmp_path / "bad.jsonl", ['{"en": "a", "de": "b"}', '{"en": '])
    with pytest.raises(UserError) as error:
        list(find_stream(data_of(tmp_path / "c", **changes), where).pairs())
    assert problem in str(error.value)


def test_a_table_may_be_named_beside_a_corpus_folder(tmp_path: Path) -> None:
    """A file's name goes before a split of the folder."""
    own = table(tmp_path / "own.tsv", numbered(2, "own"))
    (tmp_path / "tree").mkdir()
    table(tmp_path / "tree" / "train.tsv", numbered(2, "tree"))
    data = data_of(tmp_path / "c", path=str(tmp_path / "tree"))
    assert list(find_stream(data, own).pairs()) == numbered(2, "own")
    assert list(find_stream(data, "train").pairs()) == numbered(2, "tree")


def test_lines_end_at_line_feeds_alone_without_marks_and_returns(tmp_path: Path) -> None:
    """Of the first line a byte order mark is dropped; spaces and other separators stay."""
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa \r\n\ufeffb\u2028\x0b\x85c\n\n\td".encode())
    assert list(read_lines(path)) == ["a ", "\ufeffb\u2028\x0b\x85c", "", "\td"]


@pytest.mark.parametrize(("before", "column"), [(b"", 1), ("äé".encode(), 3), (b"ab ", 4)])
def test_broken_bytes_are_named_by_line_and_column_of_characters(before: bytes, column: int, tmp_path: Path) -> None:
    """Columns count letters, not bytes, from one."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + before + b"\xff\n")
    with pytest.raises(UserError, match=rf"a\.txt, line 2, column {column}: not UTF-8 \(byte 0xff\)"):
        list(read_lines(path))


def test_columns_are_found_by_name_in_every_kind_of_table(tmp_path: Path) -> None:
    """In any order and number; a column of its own goes before an entry of `translation`; nothing is an empty text."""
    rows = [
        {"translation": {"en": "a", "de": "b"}},
        {"en": "c", "de": "d", "translation": {"en": "x", "de": "y"}},
        {"de": "e", "translation": {"en": "f", "de": "x"}, "id": 1},
        {"en": None, "de": "two\nlines"},
    ]
    path = tmp_path / "a.jsonl"
    write(path, [json.dumps(rows[0]), "", " ", *map(json.dumps, rows[1:])])
    expected = [("a", "b"), ("c", "d"), ("f", "e"), ("", "two lines")]
    assert read(path) == expected
    assert read(path, source="de", target="en") == [(t, s) for s, t in expected]
    path.write_text('["en"]\n')
    with pytest.raises(UserError, match=r"expected an object with columns, got list"):
        read(path)


def test_quotes_group_in_csv_and_are_letters_in_tsv(tmp_path: Path) -> None:
    """A quoted field may hold commas, quotes and line ends; empty lines are skipped, and rows are named by line."""
    text = 'id,de,en\n1,"a, ""b""",c\n\n2,"two\nlines",d\n3,,e\n'
    csv_path = compressed(tmp_path / "a.csv", text.encode())
    assert read(csv_path) == [("c", 'a, "b"'), ("d", "two lines"), ("e", "")]
    tsv_path = compressed(tmp_path / "a.tsv", b'de\ten\n"a\tb "c"\n\n"\t\'\n \tx\n')
    assert read(tsv_path) == [('b "c"', '"a'), ("'", '"'), ("x", " ")]
    broken = compressed(tmp_path / "b.csv", b'en,de\n"a\nb",c\nd\n')
    with pytest.raises(UserError, match=r"b\.csv, line 4: 1 columns, but the header has 2"):
        read(broken)
    broken = compressed(tmp_path / "c.csv", b'en,de\na,b\n"x\ny,\n')
    with pytest.raises(UserError, match=r"c\.csv, line 3: invalid CSV"):
        read(broken)
    broken = compressed(tmp_path / "d.tsv", b"en\tde\na\tb\n\nc\n")
    with pytest.raises(UserError, match=r"d\.tsv, line 4: 1 columns"):
        read(broken)


def test_tables_of_a_split_follow_each_other_by_name(tmp_path: Path) -> None:
    """All below the folder whose names hold the split's word; a subset that is a folder narrows it."""
    for name in ("data/train-1", "data/train-0", "train/a", "valid-x", "x/dev", "test_set", "evaluation", "Contest"):
        path = tmp_path / "root" / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        table(path, [(name, name)])
    (tmp_path / "root" / "train.txt").write_text("notes on training")

    def found(split: str, **changes: Any) -> list[str]:
        data = data_of(tmp_path, path=str(tmp_path / "root"), **changes)
        return [source for source, _ in find_stream(data, split).pairs()]

    assert found("train") == ["data/train-0", "data/train-1", "train/a"]
    assert found("validation") == found("valid") == found("dev") == found("val") == ["valid-x", "x/dev"]
    assert found("test") == ["test_set"]
    assert found("evaluation") == ["evaluation"] and found("Contest") == ["Contest"]
    assert found("dev", subset="x") == ["x/dev"] and found("train", subset="nothing") == found("train")
    (tmp_path / "root" / "valid-x.csv").write_text("en,de\n")
    with pytest.raises(UserError, match="valid-x in several formats"):
        found("validation")


@pytest.mark.parametrize(
    ("left", "right"), [("abc", "ab"), ("ab", "abc"), ("", "a"), ("a", "abcd")], ids=lambda text: text or "nothing"
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_sides_of_different_length_are_never_paired_silently(left: str, right: str, tmp_path: Path) -> None:
    """Both numbers of lines are named, and no half pair is read before."""
    sides = [write(tmp_path / name, list(lines)) for name, lines in (("l.en", left), ("r.de", right))]
    read_: list[Pair] = []
    with pytest.raises(UserError, match=rf"l\.en has {len(left)} lines, .*r\.de has {len(right)};"):
        for pair in find_stream(data_of(tmp_path), sides).pairs():
            read_.append(pair)
    assert read_ == list(zip(left, right, strict=False))


@settings(LAW, phases=(Phase.explicit, Phase.generate))  # shrinking takes long and shows no more
@given(st.lists(st.integers(0, 90), max_size=12), st.data())
def test_the_line_where_sides_part_is_the_cheapest_of_all_cuts(lengths: list[int], data: st.DataObject) -> None:
    """Each cut is tried in a plain loop: log lengths fit before it as they stand and behind it shifted."""
    other = [n + data.draw(st.integers(0, 40)) for n in lengths]
    cut = data.draw(st.integers(0, len(lengths)))
    missing = data.draw(st.integers(1, 3))
    other = other[:cut] + data.draw(st.lists(st.integers(0, 90), min_size=missing, max_size=missing)) + other[cut:]
    expected = reference.misaligned_line(lengths, other)
    assert misaligned_line(lengths, other) == misaligned_line(other, lengths) == expected


def test_the_grammar_is_read_in_both_directions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each split by its name, and each direction under a key of its own."""
    made = {split: [SimpleNamespace(source=f"{split} en", target=f"{split} de")] for split in ("train", "test")}
    monkeypatch.setattr(toy, "splits", lambda: made)
    keys = set()
    for split in made:
        for source, target in (("en", "de"), ("de", "en")):
            found = find_stream(data_of(tmp_path, path="toy", source=source, target=target), split)
            assert list(found.pairs()) == [(f"{split} {source}", f"{split} {target}")]
            keys.add(found.identity)
    assert len(keys) == 4
    with pytest.raises(UserError, match="no split dev"):
        find_stream(data_of(tmp_path, path="toy"), "dev")
    with pytest.raises(UserError, match="en→en is not in the toy corpus"):
        find_stream(data_of(tmp_path, path="toy", target="en"), "train")


def test_the_key_of_the_grammar_is_the_content_of_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy elsewhere, with other times, has the same key; a change of any file, code or words, has another."""
    folder = Path(toy.__file__).parent
    data = data_of(tmp_path, path="toy")
    original = find_stream(data, "train").identity
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(folder, tmp_path / "toy", ignore=compiled, copy_function=shutil.copyfile)
    monkeypatch.setattr(toy, "__file__", str(tmp_path / "toy" / "__init__.py"))
    assert find_stream(data, "train").identity == original
    files = sorted((tmp_path / "toy").iterdir())
    assert {"nouns.tsv", "sentences.py"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert find_stream(data, "train").identity != original, file.name
        file.write_bytes(content)


class Hub:
    """The library that loads corpora of the hub, and what it was asked for."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.quiet: list[str] = []
        self.logging = SimpleNamespace(set_verbosity_error=lambda: self.quiet.append("messages"))

    def disable_progress_bars(self) -> None:
        self.quiet.append("progress")

    def load_dataset(self, name: str, subset: str | None, **keywords: Any) -> dict[str, Any]:
        self.asked.append((name, {"subset": subset, **keywords}))
        return {"train": self, "test": Hub({"en": ["t"], "de": ["u"]})}

    def iter(self, size: int) -> Iterator[dict[str, list[Any]]]:
        count = len(next(iter(self.columns.values())))
        for start in range(0, count, 2):
            yield {name: values[start : start + 2] for name, values in self.columns.items()}


def test_the_hub_is_asked_for_what_the_config_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Name, subset, revision and split; its columns or the entries of `translation` become pairs in any direction."""
    flat: dict[str, list[Any]] = {"id": [1, 2, 3], "de": ["x", "y\n", None], "en": ["a", "b", "c"]}
    nested: dict[str, list[Any]] = {
        "translation": [{"en": e, "de": d} for e, d in zip(flat["en"], flat["de"], strict=True)]
    }
    for columns in (flat, nested):
        hub = Hub(columns)
        monkeypatch.setitem(sys.modules, "datasets", hub)
        data = data_of(tmp_path, path="org/name", subset="sub", revision="r1")
        assert list(find_stream(data, "train").pairs()) == [("a", "x"), ("b", "y "), ("c", "")]
        assert hub.quiet == ["progress", "messages"], "its own output would break the progress line"
        assert hub.asked[-1] == ("org/name", {"subset": "sub", "revision": "r1", "cache_dir": str(tmp_path)})
        turned = dataclasses.replace(data, source="de", target="en")
        assert list(find_stream(turned, "train").pairs()) == [("x", "a"), ("y ", "b"), ("", "c")]
        assert list(find_stream(data, "test").pairs()) == [("t", "u")]
        with pytest.raises(UserError, match="has no split dev; possible: train, test"):
            list(find_stream(data, "dev").pairs())


def test_corpora_of_the_hub_are_cached_by_all_that_names_them(tmp_path: Path) -> None:
    """Each of name, subset, revision, split and columns counts; where the cache lies and what filters ask does not."""
    data = data_of(tmp_path, path="org/name")
    changes: list[dict[str, Any]] = [{}, {"subset": "s"}, {"revision": "s"}, {"source": "fr"}, {"target": "fr"}]
    changes += [{"source": "de", "target": "en"}]
    keys = [from_hub("org/name", "train", dataclasses.replace(data, **change)).identity for change in changes]
    keys += [from_hub("org/name", "test", data).identity, from_hub("org/other", "train", data).identity]
    assert len(set(keys)) == len(keys)
    others: list[dict[str, Any]] = [{"cache": "x"}, {"max_length": 3}, {"held_out": 9}, {"train": "test"}]
    for change in others:
        assert from_hub("org/name", "train", dataclasses.replace(data, **change)).identity == keys[0]


def test_parquet_in_an_archive_and_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows come in order, from a plain file and out of an archive."""
    import pyarrow
    from pyarrow import parquet

    pairs = numbered(11)
    sink = io.BytesIO()
    columns = {"de": [t for _, t in pairs], "en": [s for s, _ in pairs]}
    parquet.write_table(pyarrow.table(columns), sink, row_group_size=4)
    monkeypatch.setattr("seq2seq.data.sources.BLOCK", 3)
    for name in ("a.parquet", "b.parquet.zst"):
        assert read(compressed(tmp_path / name, sink.getvalue())) == pairs
