"""Laws of what is stored: lists in flat files, texts, folders built once, and names that change with their parts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seq2seq.data import store as module
from seq2seq.data.store import Ragged, Texts, Writer, blocks, key_of, open_array
from seq2seq.utils import io
from seq2seq.utils.io import build_once, temporary_path
from tests.reference.batches import matrix

LAW = settings(max_examples=30, deadline=None, derandomize=True, database=None)
ROWS = st.lists(st.lists(st.integers(0, 60_000), max_size=5), max_size=8)
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=9)


NUMBERS = itertools.count()


def new_folder(factory: pytest.TempPathFactory) -> Path:
    """An empty folder; `mktemp` takes longer than an example."""
    folder = factory.getbasetemp() / f"store-{next(NUMBERS)}"
    folder.mkdir()
    return folder


def written(folder: Path, name: str, chunks: Sequence[Sequence[object]], dtype: type) -> Ragged:
    writer = Writer(folder, name, dtype)
    for chunk in chunks:
        writer.extend(chunk)
    writer.close()
    return Ragged.open(folder, name)


@LAW
@given(ROWS, st.integers(1, 4))
def test_lists_come_back_from_memory_and_from_files_written_in_chunks(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], chunk: int
) -> None:
    """Empty lists, empty chunks and numbers of two bytes included; lengths, starts and single rows agree."""
    chunks = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    folder = new_folder(tmp_path_factory)
    stored = [Ragged.of(rows), Ragged.of(rows, np.uint16), written(folder, "a", [[], *chunks, []], np.uint16)]
    for ragged in stored:
        assert len(ragged) == len(rows)
        assert [ragged[i].tolist() for i in range(len(rows))] == rows
        assert ragged.lengths().tolist() == [len(row) for row in rows]
        chosen = np.arange(len(rows))[::-1]
        assert ragged.lengths(chosen).tolist() == [len(row) for row in rows[::-1]]
        assert ragged.starts(chosen).tolist() == [sum(map(len, rows[:i])) for i in chosen]
    assert stored[2].flat.dtype == np.uint16 and stored[0].flat.dtype == np.int32


@LAW
@given(st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=8), st.data())
def test_chosen_rows_are_padded_on_the_right_in_the_order_asked(rows: list[list[int]], data: st.DataObject) -> None:
    """Repeated rows, empty rows and any filler included."""
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    filler = data.draw(st.integers(-3, 3))
    found = Ragged.of(rows).padded(np.array(chosen), filler)
    assert found.tolist() == matrix([rows[i] for i in chosen], filler) and found.dtype == np.int64


def test_two_stores_in_one_folder_stay_separate(tmp_path: Path) -> None:
    """A name that begins another name is another store."""
    written(tmp_path, "source", [[[1, 2]]], np.int32)
    written(tmp_path, "source2", [[[3]]], np.int32)
    assert [Ragged.open(tmp_path, name)[0].tolist() for name in ("source", "source2")] == [[1, 2], [3]]


@LAW
@given(TEXTS, st.data())
def test_texts_behave_as_a_list_of_strings(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], data: st.DataObject
) -> None:
    """Whole or chosen rows, by index, slice and loop, with blocks smaller than the text."""
    folder = new_folder(tmp_path_factory)
    stored = written(folder, "t", [[line.encode() for line in lines]], np.uint8)
    rows = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=7)) if lines else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 2)
        for texts, expected in ((Texts(stored), lines), (Texts(stored, np.array(rows, int)), [lines[i] for i in rows])):
            assert list(texts) == expected and len(texts) == len(expected)
            assert [texts[i] for i in range(-len(expected), len(expected))] == expected * 2
            for start, stop, step in ((None, None, None), (1, -1, 1), (None, None, -2), (2, 5, 2), (-3, 99, 1)):
                assert texts[start:stop:step] == expected[start:stop:step]
            for wrong in (len(expected), -len(expected) - 1):
                with pytest.raises(IndexError):
                    texts[wrong]


@LAW
@given(st.integers(0, 12), st.integers(1, 5))
def test_blocks_hold_every_row_once_and_are_full_but_for_the_last(count: int, size: int) -> None:
    """No empty block, not even at an exact multiple."""
    found = list(blocks(iter(range(count)), size))
    assert list(itertools.chain(*found)) == list(range(count))
    assert [len(block) for block in found] == [size] * (count // size) + ([count % size] if count % size else [])


def test_an_empty_file_is_an_empty_array_of_its_type(tmp_path: Path) -> None:
    """Memory cannot be mapped to nothing; other files are mapped and can not be written."""
    (tmp_path / "none.uint16").touch()
    np.arange(3, dtype=np.int32).tofile(tmp_path / "some.int32")
    none, some = open_array(tmp_path / "none.uint16"), open_array(tmp_path / "some.int32")
    assert none.tolist() == [] and none.dtype == np.uint16
    assert some.tolist() == [0, 1, 2] and some.dtype == np.int32 and isinstance(some, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        some[0] = 5


# ------------------------------------------------------------------------------------------- folders


def test_a_folder_is_built_once_and_whole(tmp_path: Path) -> None:
    """It appears under its name after the build alone, leftovers of a killed build are gone, the next finds it."""
    folder = tmp_path / "deep" / "x"
    half = temporary_path(folder)
    half.mkdir(parents=True)
    (half / "left").touch()
    calls = []

    def build(temporary: Path) -> None:
        calls.append(temporary)
        assert not folder.exists() and temporary.parent == folder.parent and not list(temporary.iterdir())
        (temporary / "made").write_text("1")

    assert [build_once(folder, build), build_once(folder, build)] == [False, True]
    assert len(calls) == 1 and [path.name for path in folder.iterdir()] == ["made"]
    assert not half.exists()
    assert build_once(tmp_path / "another" / "y", build_nothing := lambda temporary: None) is False
    assert build_once(tmp_path / "another" / "y", build_nothing) is True


def test_a_folder_that_another_process_built_meanwhile_is_not_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waited for the lock finds the folder built; every process takes the same lock."""
    taken: list[str] = []

    @contextmanager
    def lock(path: str) -> Iterator[None]:
        taken.append(path)
        (tmp_path / "x").mkdir()
        yield

    monkeypatch.setattr(io, "FileLock", lock)
    assert build_once(tmp_path / "x", lambda _: pytest.fail("built twice")) is True
    assert taken == [f"{tmp_path}/x.lock"]


def test_a_build_that_fails_leaves_nothing_and_the_next_one_builds(tmp_path: Path) -> None:
    """The error reaches the caller, and what was half made is removed."""

    def fails(temporary: Path) -> None:
        (temporary / "half").touch()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build_once(tmp_path / "x", fails)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
    assert build_once(tmp_path / "x", lambda temporary: (temporary / "a").touch()) is False
    assert os.listdir(tmp_path / "x") == ["a"]


# --------------------------------------------------------------------------------------------- names

PARTS: list[tuple[object, ...]] = [
    (), ("",), ("", ""), ("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("ab", ""), ("a b",), (("a", "b"),), (["a"],),
    (1,), ("1",), (1.0,), (True,), (None,), ("None",), (b"",), (b"a",), (b"a", b"b"), (b"ab",), (0,), (0, 0),
    (b"a", "a"),
    ({"a": 1},), ({"a": 2},), ((),), (((), ()),), (-1,), (10**20,), ("a" * 100,), ("a" * 101,), (b"a" * 101,),
]  # fmt: skip


def test_names_differ_wherever_parts_differ() -> None:
    """In value, type, number, order, or in where one part ends and the next begins."""
    names = {repr(parts): key_of(*parts) for parts in PARTS}
    assert len(set(names.values())) == len(names)
    assert all(key_of(*parts) == names[repr(parts)] for parts in PARTS), "the same parts have the same name"
    assert all(len(name) >= 20 and set(name) <= set("0123456789abcdef") for name in names.values())


def test_names_change_with_the_format_of_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another format never reads the files of this one."""
    before = [key_of(*parts) for parts in PARTS]
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert not set(before) & {key_of(*parts) for parts in PARTS}
