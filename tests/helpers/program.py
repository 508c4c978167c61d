"""The program as its users run it, in a copy of this process where the system has `fork`."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from seq2seq.cli.main import main
from tests.helpers.configs import TINY
from tests.helpers.corpora import write_corpus

Program = Callable[..., "subprocess.CompletedProcess[str]"]
forks = pytest.mark.skipif(sys.platform != "linux", reason="processes that share their weights exist on Linux only")
shards = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this version of torch shards weights on GPUs only"
)
QUICK = [
    "precision=float32",
    "tokenizer.vocabulary=60",
    "training.tokens=400",
    "training.examples=1",
    "training.log_every=1",
]


def files(folder: Path) -> list[str]:
    train, valid, test = (
        write_corpus(folder, *given) for given in (("train", 400, 1), ("valid", 30, 2), ("test", 40, 3))
    )
    return [
        "data=files",
        *(
            f"data.{split}=[{s},{t}]"
            for split, (s, t) in zip(("train", "validation", "test"), (train, valid, test), strict=True)
        ),
    ]


def train(program: Program, folder: Path, family: str, *overrides: str) -> str:
    result = program(
        "train", f"model={family}", *TINY[family], "model.attention.heads=2", *files(folder), *QUICK, *overrides
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_program(arguments: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_forked(arguments, given, folder) if hasattr(os, "fork") else run_anew(arguments, given, folder)


def run_anew(arguments: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m seq2seq`, which takes seconds to import torch."""
    command = [sys.executable, "-m", "seq2seq", *arguments]
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, timeout=600, encoding="utf-8")


# What commands import when they need it.
IMPORTED_LATE = ("hydra.main", "sacrebleu.metrics", "torch._dynamo", "torch.utils.tensorboard")


def run_forked(arguments: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same in a copy of this process, which has imported everything; it ends without running its exit handlers."""
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        reading, writing = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(writing)
            for number, stream in enumerate((reading, out.fileno(), err.fileno())):
                os.dup2(stream, number)
            _become_the_program(arguments, folder)
        os.close(reading)
        writer = threading.Thread(target=_write_all, args=(writing, given.encode()))
        writer.start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        writer.join()
        texts = []
        for output in (out, err):
            output.seek(0)
            texts.append(output.read().decode())
        return subprocess.CompletedProcess(["seq2seq", *arguments], code, *texts)


def _become_the_program(arguments: Sequence[str], folder: Path) -> NoReturn:
    code = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 (they live as long as it does)
            for number, mode in enumerate("rww")
        )
        os.chdir(folder)
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        sys.argv = ["seq2seq", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _write_all(pipe: int, given: bytes) -> None:
    with suppress(BrokenPipeError), open(pipe, "wb") as stream:
        stream.write(given)
