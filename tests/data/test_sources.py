"""Every kind of corpus: read alike, failing well, stored once; and the findings of the doctor on damaged ones."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard

from seq2seq.cli.main import load_config
from seq2seq.config.schema import DataConfig
from seq2seq.data.batching import Batches, temperature_mix
from seq2seq.data.corpus import Corpora, open_corpora, store
from seq2seq.data.doctor import examine, quick
from seq2seq.data.encoding import encode_training, resegmenter
from seq2seq.data.sources import Pair, find_stream, from_hub, misaligned_line
from seq2seq.data.tokenizer import PAD, train_tokenizer
from seq2seq.data.toy import splits
from seq2seq.training.pipeline import train
from seq2seq.utils.errors import UserError
from seq2seq.utils.io import build_once
from tests.helpers.configs import changed, composed
from tests.helpers.corpora import drawn, random_corpus
from tests.helpers.program import Program

PAIRS: list[Pair] = [(f"the {n} dogs, “{n}”", f'die {n} Hunde\u2028und\x0b{n} "Katzen"') for n in range(60)]
ARCHIVES: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def text_of(kind: str, pairs: list[Pair]) -> bytes:
    """The pairs as a table of a kind."""
    if kind in ("jsonl", "nested.jsonl"):
        rows = [{"en": en, "de": de} for en, de in pairs]
        return "".join(json.dumps({"translation": r} if "nested" in kind else r) + "\n" for r in rows).encode()
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"en": [en for en, _ in pairs], "de": [de for _, de in pairs]}), sink)
        return sink.getvalue()
    rows_ = [("en", "de"), *pairs]
    if kind == "tsv":
        return "".join("\t".join(row) + "\n" for row in rows_).encode()
    out = io.StringIO()
    csv.writer(out).writerows(rows_)
    return out.getvalue().encode()


def config(folder: Path, *overrides: str) -> DataConfig:
    return changed(composed("data=files", "data.train=x"), f"data.cache={folder / 'cache'}", *overrides).data


def pairs_of(data: DataConfig) -> list[Pair]:
    assert data.train is not None
    return list(find_stream(data, data.train).pairs())


KINDS = [(kind, archive) for kind in ("jsonl", "nested.jsonl", "csv", "tsv", "parquet") for archive in ARCHIVES]


@pytest.mark.parametrize("kind,archive", KINDS)
def test_every_table_holds_the_same_pairs_in_both_directions(kind: str, archive: str, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.{kind}{archive}"
    path.write_bytes(ARCHIVES[archive](text_of(kind, PAIRS)))
    data = config(tmp_path, f"data.train={path}")
    assert pairs_of(data) == PAIRS
    assert pairs_of(dataclasses.replace(data, source="de", target="en")) == [(de, en) for en, de in PAIRS]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_plain_files_pair_by_line_feeds_alone(archive: str, tmp_path: Path) -> None:
    """Other characters that some libraries take for a line's end stay inside their sentence."""
    paths = [tmp_path / f"corpus.{side}{archive}" for side in ("en", "de")]
    for i, path in enumerate(paths):
        path.write_bytes(ARCHIVES[archive]("".join(f"{pair[i]}\n" for pair in PAIRS).encode()))
    assert pairs_of(config(tmp_path, f"data.train=[{paths[0]},{paths[1]}]")) == PAIRS


@pytest.mark.parametrize("kind", ["jsonl", "nested.jsonl", "csv", "parquet"])
def test_a_folder_in_hub_layout(kind: str, tmp_path: Path) -> None:
    """Names below the folder decide which split a file belongs to; the folder's own name does not."""
    folder = tmp_path / "test-of-train"
    for name, part in (
        ("train-00000-of-00002", PAIRS[:10]),
        ("train-00001-of-00002", PAIRS[10:20]),
        ("val", PAIRS[20:30]),
    ):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / f"{name}.{kind}").write_bytes(text_of(kind, part))
    data = load_config("train", "data=multi30k", f"data.path={folder}", f"data.cache={tmp_path}").data
    assert pairs_of(data) == PAIRS[:20]
    for name in ("validation", "val", "dev"):
        assert list(find_stream(data, name).pairs()) == PAIRS[20:30]
    with pytest.raises(UserError, match=r"no split test; possible: train, validation"):
        find_stream(data, "test")


def plain_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        for side, language in enumerate(("en", "de", "fr")):
            lines = [pair[min(side, 1)] for pair in PAIRS[number : number + 9]]
            (folder / name.format(language)).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def test_a_folder_of_plain_files(tmp_path: Path) -> None:
    """Two files are a split by their common name; an exact name goes before a synonym."""
    folder = plain_folder(tmp_path / "test", "train.lc.{}", "val.lc.{}", "test_2016.lc.{}", "test_2017.lc.{}")
    (folder / "README").write_text("x", encoding="utf-8")
    (folder / "notes.en").write_text("x", encoding="utf-8")
    data = load_config("train", "data=multi30k", f"data.path={folder}", f"data.cache={tmp_path}").data
    by_split = ("train", 0), ("validation", 1), ("dev", 1), ("test_2016", 2), ("test_2017", 3)
    for split, number in by_split:
        assert list(find_stream(data, split).pairs()) == PAIRS[number : number + 9], split
    other_way = dataclasses.replace(data, source="de", target="en")
    assert list(find_stream(other_way, "train").pairs()) == [(de, en) for en, de in PAIRS[:9]]
    for changes, split, problem in (
        ({}, "test", r"several files for test; possible: test_2016.lc, test_2017.lc"),
        ({}, "dev2", r"no split dev2; possible: test_2016.lc, test_2017.lc, train.lc, val.lc"),
        ({"target": "cs"}, "train", r"has no train.lc.cs; choose data.target among de, en, fr"),
        ({"source": None}, "train", r"does not show a direction; choose data.source among de, en, fr"),
    ):
        with pytest.raises(UserError, match=problem):
            find_stream(dataclasses.replace(data, **changes), split)


@pytest.mark.parametrize("kind", ["jsonl", "nested.jsonl", "parquet"])
def test_what_the_hub_library_loads_is_read_alike(kind: str) -> None:
    """The code that reads hub corpora, on a folder instead: the library loads both the same way."""
    with tempfile.TemporaryDirectory(prefix="corpus") as name:  # its splits follow the whole path, so no "test" in it
        folder = Path(name)
        (folder / f"train.{kind}").write_bytes(text_of(kind, PAIRS))
        data = load_config("train", "data=multi30k", f"data.path={folder}", f"data.cache={folder}/cache").data
        assert list(from_hub(str(folder), "train", data).pairs()) == PAIRS
        with pytest.raises(UserError, match=r"no split valid; possible: train"):
            list(from_hub(str(folder), "valid", data).pairs())
        with pytest.raises(UserError, match=r"no column fr; possible: en, de"):
            list(from_hub(str(folder), "train", dataclasses.replace(data, source="fr")).pairs())


SMALL = ["model.width=8", "model.feed_forward=8", "model.attention.heads=2", "tokenizer.vocabulary=90"]
SMALL += ["training.updates=2", "training.validate_every=2", "training.tokens=300"]


def trained(capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What a training of two updates prints."""
    train(load_config("train", *SMALL, *overrides))
    out = capsys.readouterr().out
    assert "update 2/2" in out and "test       BLEU" in out
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,archive",
    [
        ("text", ""),
        ("text", ".gz"),
        ("jsonl", ".zst"),
        ("nested.jsonl", ".xz"),
        ("csv", ".bz2"),
        ("tsv", ""),
        ("parquet", ""),
    ],
)
def test_two_updates_on_every_kind(
    kind: str, archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All kinds in all archives are read alike, as the laws above say; each is also trained on once."""
    monkeypatch.chdir(tmp_path)
    if kind == "text":
        for i, side in enumerate(("en", "de")):
            Path(f"c.{side}{archive}").write_bytes(ARCHIVES[archive]("".join(f"{p[i]}\n" for p in PAIRS).encode()))
        train = f"[c.en{archive},c.de{archive}]"
    else:
        train = f"c.{kind}{archive}"
        Path(train).write_bytes(ARCHIVES[archive](text_of(kind, PAIRS)))
    assert "54 training, 3 validation, 3 test pairs" in trained(capsys, "data=files", f"data.train={train}")


@pytest.mark.slow
@pytest.mark.usefixtures("small_toy")
def test_two_updates_on_a_folder_and_on_the_grammar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name, part in (("train", PAIRS[:40]), ("dev", PAIRS[40:50]), ("test", PAIRS[50:])):
        Path("folder", f"{name}.csv").write_bytes(text_of("csv", part))
    out = trained(capsys, "data=multi30k", "data.path=folder", "data.source=de", "data.target=en")
    assert "multi30k de→en: 40 training, 10 validation, 10 test pairs" in out
    assert "toy de→en: 2,000 training" in trained(capsys, "data.source=de", "data.target=en")


# ------------------------------------------------------------------------------------------ failures


def refused(folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        open_corpora(config(folder, *overrides), 1)
    assert not [path for path in (folder / "cache").glob("*") if path.suffix != ".lock"], "nothing half-made is left"
    (line,) = error.value.problems
    return line


def test_sides_of_different_length_are_reported_with_the_line_where_they_diverge(
    multi30k: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (multi30k / "val.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "a.en").write_text("".join(row["en"] + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.de").write_text("".join(row["de"] + "\n" for row in rows[:600] + rows[601:]), encoding="utf-8")
    line = refused(tmp_path, f"data.train=[{tmp_path}/a.en,{tmp_path}/a.de]")
    assert "a.en has 1,014 lines" in line and "a.de has 1,013" in line
    line_number = int(line.partition("at line ")[2].partition(";")[0])
    assert abs(line_number - 601) < 12, "lengths alone find the line within a dozen"


def test_sides_diverge_where_their_lengths_stop_matching() -> None:
    left = [3, 50, 9, 80, 20, 33, 70, 12, 95, 41]
    assert misaligned_line(left, left[:4] + left[5:]) in (5, 6)
    assert misaligned_line(left[:4] + left[5:], left) in (5, 6)


def test_what_is_not_utf8_is_named_by_file_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes("fine\ncäf".encode() + b"\xe9\n")
    (tmp_path / "a.de").write_text("1\n2\n")
    line = refused(tmp_path, f"data.train=[{tmp_path}/a.en,{tmp_path}/a.de]")
    assert "a.en, line 2, column 4: not UTF-8 (byte 0xe9)" in line


def test_a_byte_order_mark_is_no_letter(tmp_path: Path) -> None:
    (tmp_path / "a.en").write_bytes("\ufeffdog\n".encode())
    (tmp_path / "a.de").write_bytes("\ufeffää".encode() + b"\xe9\n")
    line = refused(tmp_path, f"data.train=[{tmp_path}/a.en,{tmp_path}/a.de]")
    assert "a.de, line 1, column 3: not UTF-8 (byte 0xe9)" in line
    (tmp_path / "a.de").write_bytes("\ufeffHund\n".encode())
    assert pairs_of(config(tmp_path, f"data.train=[{tmp_path}/a.en,{tmp_path}/a.de]")) == [("dog", "Hund")]


def test_two_tables_are_not_two_sides(tmp_path: Path) -> None:
    assert "add further tables with data.extra" in refused(tmp_path, "data.train=[a.tsv,b.tsv]")
    (tmp_path / "x.tsv").write_text("en\tde\na\tb\n")
    assert "is a file, not a folder; use data.train=" in refused(
        tmp_path, f"data.path={tmp_path}/x.tsv", "data.train=train"
    )


@pytest.mark.parametrize("kind", ["jsonl", "nested.jsonl", "csv", "tsv", "parquet"])
def test_a_missing_column_names_those_that_exist(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"c.{kind}").write_bytes(text_of(kind, PAIRS))
    assert "no column fr; possible: en, de" in refused(tmp_path, f"data.train={tmp_path}/c.{kind}", "data.target=fr")


@pytest.mark.parametrize("name", ["c.jsonl", "c.csv", "c.tsv"])
def test_an_empty_file_is_reported_as_empty(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert refused(tmp_path, f"data.train={tmp_path / name}").endswith(f"{name}: no pairs found")


@pytest.mark.parametrize("kind,archive", [(k, a) for k, a in KINDS if k in ("jsonl", "parquet") and a])
def test_a_truncated_archive_is_named(kind: str, archive: str, tmp_path: Path) -> None:
    many = [(f"{random.Random(i).random()}", str(i)) for i in range(5000)]
    whole = ARCHIVES[archive](text_of(kind, many))
    (tmp_path / f"c.{kind}{archive}").write_bytes(whole[: len(whole) // 2])
    line = refused(tmp_path, f"data.train={tmp_path}/c.{kind}{archive}")
    assert f"c.{kind}{archive}: " in line and "truncated or damaged" in line


def test_rows_that_do_not_fit_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"en": "a", "de": "b"}\n{"en": \n')
    assert "c.jsonl, line 2, column 8: not one JSON object per line" in refused(
        tmp_path, f"data.train={tmp_path}/c.jsonl"
    )
    (tmp_path / "c.tsv").write_text("en\tde\na\tb\tc\n")
    assert "c.tsv, line 2: 3 columns, but the header has 2: en, de" in refused(tmp_path, f"data.train={tmp_path}/c.tsv")
    (tmp_path / "c.csv").write_text('en,de\na,b\n"never ends,c\n')
    assert "c.csv, line 3: invalid CSV" in refused(tmp_path, f"data.train={tmp_path}/c.csv")
    (tmp_path / "d.jsonl").write_text('{"en": "a", "de": 5}\n')
    assert "d.jsonl, line 1, column de: 5 is not text" in refused(tmp_path, f"data.train={tmp_path}/d.jsonl")


@pytest.mark.usefixtures("small_toy")
def test_the_toy_corpus_has_two_directions() -> None:
    forward = find_stream(load_config("train").data, "validation").pairs()
    backward = find_stream(load_config("train", "data.source=de", "data.target=en").data, "validation").pairs()
    assert [(t, s) for s, t in forward] == list(backward)
    with pytest.raises(UserError, match="fr→de is not in the toy corpus; possible: en→de, de→en"):
        find_stream(load_config("train", "data.source=fr").data, "train")


# --------------------------------------------------------------------------- filters, splits and mixes


def files(folder: Path, pairs: list[Pair], *overrides: str) -> Corpora:
    for i, side in enumerate(("en", "de")):
        (folder / f"f.{side}").write_text("".join(f"{pair[i]}\n" for pair in pairs), encoding="utf-8")
    return open_corpora(config(folder, f"data.train=[{folder}/f.en,{folder}/f.de]", *overrides), 1)


def test_filters_drop_whole_pairs_and_count_them(tmp_path: Path) -> None:
    good = [(f"sentence number {n}", f"Satz Nummer {n}") for n in range(100)]
    bad = [("", "leer"), ("leer", "  "), ("same", "same"), good[3], ("x", "y" * 40), ("z" * 300, "z" * 299)]
    filters = ["identical=true", "duplicate=true", "max_ratio=9", "max_characters=200"]
    corpora = files(tmp_path, [*good, *bad], *(f"data.filters.{f}" for f in filters))
    kept = {
        pair
        for c in (corpora.train, corpora.validation, corpora.test)
        if c
        for pair in zip(c.source, c.target, strict=True)
    }
    assert kept == set(good)
    assert corpora.notes[:5] == (
        "2 pairs with an empty side removed",
        "1 pairs over 200 characters removed",
        "1 pairs with a length ratio over 9 removed",
        "1 pairs with identical sides removed",
        "1 pairs that repeat an earlier pair removed",
    )


def test_held_out_sets_have_no_source_in_common_with_training(tmp_path: Path) -> None:
    pairs = [(f"source {n % 70}", f"target {n}") for n in range(400)]
    corpora = files(tmp_path, pairs, "data.held_out=15")
    parts = [corpora.train, corpora.validation, corpora.test]
    together = [pair for c in parts if c for pair in zip(c.source, c.target, strict=True)]
    assert sorted(together) == sorted(pairs), "a partition"
    sources = [set(c.source) for c in parts if c]
    assert not (sources[0] & sources[1] or sources[0] & sources[2] or sources[1] & sources[2])
    assert all(15 - 6 < len(c) <= 15 for c in parts[1:] if c), "a source has up to six targets"
    again = open_corpora(config(tmp_path, f"data.train=[{tmp_path}/f.en,{tmp_path}/f.de]", "data.held_out=15"), 1)
    assert list(again.test.target) == list(parts[2].target) if again.test and parts[2] else False


@pytest.mark.parametrize("temperature,counts", [(1.0, (100, 300)), (1e9, (200, 200)), (0.01, (0, 400))])
def test_corpora_mix_by_weight_and_temperature(temperature: float, counts: tuple[int, int]) -> None:
    assert temperature_mix([100, 400], [1, 1], temperature).counts == counts
    assert temperature_mix([100, 400], [3, 1], 1.0).counts == (200, 200)
    drawn = temperature_mix([100, 400], [1, 1], temperature).draw(np.random.default_rng(0))
    seen = np.bincount(drawn, minlength=400)
    assert (seen[:100].sum(), seen[100:].sum()) == counts
    assert np.ptp(seen[:100]) <= 1 and np.ptp(seen[100:]) <= 1, "a corpus is used up before it begins anew"


def test_several_corpora_train_as_one(program: Program, tmp_path: Path) -> None:
    for name, part in (("a", PAIRS[:40]), ("b", PAIRS[40:])):
        (tmp_path / f"{name}.tsv").write_bytes(text_of("tsv", part))
    more = "data.extra=[{train: b.tsv, weight: 6}]"
    result = program("train", "data=files", "data.train=a.tsv", "data.held_out=2", more, *SMALL)
    assert result.returncode == 0, result.stderr
    train, other = (int(n) for n in re.findall(r"an epoch draws (\d+), (\d+) pairs", result.stdout)[0])
    assert train + other == 56 and other > 2 * train, "the second corpus has half the pairs and six times the weight"


# ------------------------------------------------------------------------------------------ the cache


def test_a_store_is_built_once_by_processes_that_start_together(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_build_slowly, [tmp_path / "x"] * 4)
    assert sorted(found) == [False, True, True, True]
    assert (tmp_path / "x" / "log").read_text() == "built\n"


def _build_slowly(folder: Path) -> bool:
    def build(tmp: Path) -> None:
        time.sleep(0.3)
        with open(tmp / "log", "a") as log:
            log.write("built\n")

    return build_once(folder, build)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file of the same name, or a full disk, which numpy reports without a reason of the system; nothing is left."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache: .*/file cannot be written \(File exists\); set another folder"):
        build_once(tmp_path / "file" / "x", lambda tmp: None)

    def full(tmp: Path) -> None:
        (tmp / "half").touch()
        raise OSError("8 requested and 0 written")

    with pytest.raises(UserError, match=r"^data\.cache: .*/full cannot be written \(.+\); set another folder"):
        build_once(tmp_path / "full" / "x", full)
    assert not [path for path in (tmp_path / "full").iterdir() if path.suffix != ".lock"]


def test_a_killed_build_leaves_nothing_half_made(tmp_path: Path) -> None:
    def killed(tmp: Path) -> None:
        (tmp / "half").touch()
        os._exit(9)

    child = multiprocessing.get_context("fork").Process(target=build_once, args=(tmp_path / "x", killed))
    child.start()
    child.join()
    assert child.exitcode == 9 and not (tmp_path / "x").exists()
    build_once(tmp_path / "x", lambda tmp: (tmp / "whole").touch())
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["whole"]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "c.tsv"
    for content in (PAIRS[:5], PAIRS[5:12]):
        path.write_bytes(text_of("tsv", content))
        data = config(tmp_path, f"data.train={path}")
        assert list(store(find_stream(data, str(path)), data.cache).corpus().source) == [en for en, _ in content]


# ------------------------------------------------------------------------------------- determinism


def hashes(batches: Batches) -> list[list[int]]:
    return [rows.tolist() for epoch in range(3) for rows in batches.rows(epoch)]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [64, 10_000])
@pytest.mark.parametrize("sampling", [0.0, 0.2])
def test_batches_are_the_same_on_every_start_and_after_any_stop(
    pool: int, sampling: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batches, "POOL", pool)
    corpora = files(
        tmp_path, [(f"{i} old dogs see {i % 7} cats", f"{i} alte Hunde sehen {i % 7} Katzen") for i in range(300)]
    )
    settings = load_config("train", "tokenizer.vocabulary=80").tokenizer
    tokenizer, _ = train_tokenizer(corpora.train, settings)

    def made() -> Batches:
        encoded, _ = encode_training(corpora.train, tokenizer, 100, str(tmp_path / "cache"))
        resegment = resegmenter(corpora.train, encoded, tokenizer, sampling, 100) if sampling else None
        return Batches(encoded, 300, seed=5, resegment=resegment)

    assert hashes(made()) == hashes(made())
    first = made()
    whole = [(b.index_B.tolist(), b.source_BS.tolist()) for b in drawn(first, 120)]
    assert first.epoch >= 2
    for stop in (1, 29, 77):
        half = made()
        list(islice(half, stop))
        again = made()
        again.load_state_dict(json.loads(json.dumps(half.state_dict())))
        assert [(b.index_B.tolist(), b.source_BS.tolist()) for b in drawn(again, 120 - stop)] == whole[stop:]
    if sampling:
        spelled = {tuple(x for x in row if x != PAD) for _, rows in whole for row in rows}
        assert len(spelled) > 1.2 * len(corpora.train), "epochs segment anew"


def test_a_sample_that_is_too_long_stays_as_it_was(tmp_path: Path) -> None:
    corpora = files(tmp_path, [(f"{i} old dogs see {i % 7} cats", f"{i} alte Hunde") for i in range(100)])
    tokenizer, _ = train_tokenizer(corpora.train, load_config("train", "tokenizer.vocabulary=80").tokenizer)
    longest = max(map(len, tokenizer.encode_source(corpora.train.source[:]))) - 1
    encoded, _ = encode_training(corpora.train, tokenizer, longest, str(tmp_path))
    sampled = resegmenter(corpora.train, encoded, tokenizer, 0.5, longest)(np.arange(len(encoded)), "ab")
    assert sampled.rows.tolist() == encoded.rows.tolist() and int(sampled.width().max()) <= longest + 1
    assert any(sampled.source[i].tolist() != encoded.source[i].tolist() for i in range(len(encoded)))


def test_a_late_epoch_needs_no_replay() -> None:
    """The state is the position itself: nothing before it is computed again."""
    corpus = random_corpus([int(n) for n in np.random.default_rng(0).integers(1, 30, 500)])
    batches, asked = Batches(corpus, 200, seed=1), []
    order = batches.order
    batches.order = lambda epoch: asked.append(epoch) or order(epoch)  # type: ignore[method-assign, func-returns-value]
    batches.load_state_dict({"seed": 1, "pairs": len(corpus), "epoch": 1000, "pool": 0, "position": 7})
    (batch,) = drawn(batches, 1)
    assert set(asked) == {1000}
    assert batch.index_B.tolist() == list(Batches(corpus, 200, seed=1).rows(1000))[7].tolist()


def test_processes_divide_an_epoch() -> None:
    """The batches of three processes are disjoint, and together those of one process."""
    corpus = random_corpus([int(n) for n in np.random.default_rng(0).integers(1, 30, 500)])
    alone = [batch.index_B.tolist() for batch in drawn(Batches(corpus, 200, seed=1), 90)]
    rank_batches = []
    for rank in range(3):
        batches = Batches(corpus, 200, seed=1, rank=rank, world_size=3)
        rank_batches.append([batch.index_B.tolist() for batch in drawn(batches, 30)])
    assert [batch for together in zip(*rank_batches, strict=True) for batch in together] == alone


# ---------------------------------------------------------------------------------------- the doctor


@pytest.fixture(scope="module", params=["grammar", "multi30k"])
def real(request: pytest.FixtureRequest) -> dict[str, list[Pair]]:
    if request.param == "grammar":
        parts = {"train": "train", "val": "validation", "test": "test"}
        return {name: [(p.source, p.target) for p in splits()[split]][:6000] for name, split in parts.items()}
    folder, read = request.getfixturevalue("multi30k"), {}
    for name in ("train", "val", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        read[name] = [(row["en"], row["de"]) for row in rows][:6000]
    return read


@pytest.mark.parametrize("size", [1, 3, 249, 250, 600, 750])
def test_the_doctor_checks_corpora_of_any_size(size: int, tmp_path: Path) -> None:
    corpora = files(tmp_path, [(f"sentence {n}", f"Satz {n}") for n in range(size + 2)], "data.held_out=1")
    assert len(examine(corpora)) >= 10 and len(quick(corpora)) >= 3


def serious(folder: Path, parts: dict[str, list[Pair]]) -> set[str]:
    for name, pairs in parts.items():
        (folder / f"{name}.jsonl").write_bytes(text_of("jsonl", pairs))
    data = load_config(
        "train", "data=multi30k", f"data.path={folder}", f"data.cache={folder}/cache", "data.filters.empty=false"
    ).data
    return {finding.name for finding in examine(open_corpora(data, 1)) if finding.serious}


@pytest.mark.slow
def test_the_doctor_finds_nothing_serious_in_real_text(real: dict[str, list[Pair]], tmp_path: Path) -> None:
    assert serious(tmp_path, real) == set()


@pytest.mark.slow
def test_the_doctor_names_each_damage(real: dict[str, list[Pair]], tmp_path: Path) -> None:
    train, middle = real["train"], len(real["train"]) // 2
    german = [de for _, de in train]
    damages = {
        "possibly misaligned pairs": [
            (en, de) for (en, _), de in zip(train, german[:middle] + german[middle + 1 :], strict=False)
        ],
        "test sources seen in training": train + real["test"][:200],
        "target lines in the other language": [(en, en if i % 20 == 0 else de) for i, (en, de) in enumerate(train)],
        "pairs with an empty side": [(en, "" if i % 50 == 0 else de) for i, (en, de) in enumerate(train)],
        "target lines with misread encoding (Ã¼, �)": [
            (en, de.encode().decode("cp1252", "replace") if i % 10 == 0 else de) for i, (en, de) in enumerate(train)
        ],
    }
    for name, damaged in damages.items():
        folder = tmp_path / name.split()[0]
        folder.mkdir(exist_ok=True)
        found = serious(folder, {**real, "train": damaged})
        assert name in found, (name, found)


def test_the_doctors_page_fits_a_screen(program: Program, multi30k: Path) -> None:
    result = program("doctor", "data=multi30k", f"data.path={multi30k}", "tokenizer=bpe")
    assert result.returncode == 0, result.stderr
    assert (
        len(result.stdout.splitlines()) < 40 and "29,000 training, 1,014 validation, 1,000 test pairs" in result.stdout
    )
    data = json.loads(program("doctor", "data=multi30k", f"data.path={multi30k}", "tokenizer=bpe", "json=true").stdout)
    assert data["pairs"] == 29000 and {f["name"] for f in data["findings"]} >= {"duplicate pairs", "identical pairs"}
