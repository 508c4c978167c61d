"""Fixtures of all tests, and what every test process needs before torch is imported."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
from functools import cache, partial
from pathlib import Path
from typing import Any

# One thread in this process and in every program that a test starts: small products gain nothing from a second one,
# and wait long for it where another process uses its core. It must be set before torch is imported.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import pytest
import torch
import yaml

from seq2seq.data import toy
from seq2seq.training import meter as meter_module
from tests.helpers.corpora import small_grammar
from tests.helpers.program import Program, run_program

# A shell that starts the tests in the background makes them, and every program they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run the program itself are slow, whatever else they do."""
    for item in items:
        if "program" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    """Sums of floats depend on the number of threads; one does not wait for a core that is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def multi30k() -> Path:
    """Real text: a folder with train, val and test .jsonl files, named in the variable MULTI30K."""
    folder = os.environ.get("MULTI30K")
    if not folder:
        pytest.skip("the variable MULTI30K names no folder of Multi30k")
    return Path(folder)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The program as its users run it, in an empty folder."""

    def run(*arguments: str, input: str = "", cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return run_program(arguments, input, cwd)

    return run


@pytest.fixture
def small_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small built-in corpus, also for the programs that a test runs."""
    monkeypatch.setattr(toy, "splits", small_grammar)


SAFE_LOAD = yaml.safe_load


@cache
def _parsed(text: str) -> Any:
    return SAFE_LOAD(text)


@pytest.fixture
def yaml_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults are read from configs/ for each name and each stored config."""
    monkeypatch.setattr(yaml, "safe_load", lambda text: copy.deepcopy(_parsed(text)))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for a disk, YAML by the C library, and no large matrix products to measure a machine by."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    if yaml.__with_libyaml__:
        monkeypatch.setattr("yaml.safe_dump", partial(yaml.dump, Dumper=yaml.CSafeDumper))
        monkeypatch.setattr("yaml.safe_load", partial(yaml.load, Loader=yaml.CSafeLoader))
    monkeypatch.setattr(meter_module, "matmul_flops", lambda *_: 1e9)
