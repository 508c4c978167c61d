"""The compiled part of inference: built once, and a plain reason where it cannot be."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from seq2seq.model import native
from tests.helpers.models import compiled


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded yet."""
    compiled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    yield tmp_path / "seq2seq"
    native.load.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A program that takes the compiler's part."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# It writes what it is asked for: `-o FILE` are its last two words.
COPY = 'echo called >> "{log}"; sleep 0.1; for last; do :; done; echo library > "$last"'


def test_two_processes_that_need_the_library_compile_it_once(fresh: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [compiler(tmp_path, COPY.format(log=log))]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(native.build, [command, command])
    assert first == second == native.build(command)
    assert log.read_text() == "called\n" and first.read_text() == "library\n"


def test_other_flags_or_another_source_are_another_library(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [compiler(tmp_path, COPY.format(log=os.devnull))]
    paths = {native.build(command), native.build([*command, "-O1"])}
    changed = tmp_path / "changed.cpp"
    changed.write_text("int x;")
    monkeypatch.setattr(native, "SOURCE", changed)
    assert len(paths | {native.build(command)}) == 3


def test_a_compiler_that_fails_leaves_nothing_behind_and_gives_its_first_error(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = 'echo "native.cpp:1: note: x" >&2; echo "native.cpp:2: error: no such type" >&2'
    broken = compiler(tmp_path, f'for last; do :; done; echo half > "$last"; {says}; exit 1')
    monkeypatch.setenv("CXX", broken)
    library, problem = native.load()
    assert library is None
    assert problem == f"{broken} does not compile native.cpp (native.cpp:2: error: no such type)"
    assert not [*fresh.glob("*.so")] and not [*fresh.glob("*.unfinished")]


def test_without_a_compiler_the_reason_says_what_to_do(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.load() == (None, "no C++ compiler found; install one, or set CXX")


def test_the_compiler_may_have_words_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in CXX='ccache c++'."""
    monkeypatch.setenv("CXX", "env c++")
    command = native.compile_command("any")
    assert command is not None and command[:2] == ["env", "c++"]


@pytest.mark.slow
def test_the_source_compiles_without_a_warning() -> None:
    """With all the usual ones, for this CPU and for any."""
    compiled()
    for level in {native.level(), "any"}:
        command = native.compile_command(level)
        assert command is not None
        words = [*command, "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-fsyntax-only", str(native.SOURCE)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stderr == ""
