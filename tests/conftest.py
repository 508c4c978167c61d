"""What the tests share: small configs, small models, small corpora, and the program itself."""

from __future__ import annotations

import importlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NoReturn

# One thread in this process and in every program that a test starts: small products gain nothing from a second one,
# and wait long for it where another process uses its core. It must be set before torch is imported.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from seq2seq.cli.main import load_config, main
from seq2seq.config.schema import ModelConfig, TrainConfig
from seq2seq.data.batching import Batches
from seq2seq.data.corpus import Corpus
from seq2seq.data.encoding import Batch, EncodedCorpus
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import BEGIN, END, PAD, Vocabulary, train_tokenizer
from seq2seq.inference.checkpoint import WEIGHTS, write_config
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.run import Run

forks = pytest.mark.skipif(sys.platform != "linux", reason="processes that share their weights exist on Linux only")
REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY = Vocabulary(40, 40, joint=True)
FAMILIES = ("transformer", "lstm")

# A shell that starts the tests in the background makes them, and every program they start, deaf to Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "transformer": ["model.width=16", "model.feed_forward=32", "model.encoder_layers=2", "model.decoder_layers=2"],
    "lstm": ["model.width=16", "model.embedding=12", "model.encoder_layers=2", "model.decoder_layers=2"],
}
STILL = ["model.dropout=0", "model.attention.dropout=0"]


@cache
def tiny_config(family: str, *overrides: str) -> TrainConfig:
    """A small config without dropout, unless the overrides say otherwise."""
    return load_config("train", f"model={family}", *TINY[family], "model.attention.heads=2", *STILL, *overrides)


def tiny_model(family: str, *overrides: str, vocabulary: Vocabulary = VOCABULARY, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    config: ModelConfig = tiny_config(family, *overrides).model
    model = build_model(config, vocabulary).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Zeros and ones at the start would hide a gain or a bias that is not used.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_sentences(lengths: list[int], seed: int = 0, vocabulary: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [[*torch.randint(END + 1, vocabulary, (n,), generator=generator).tolist(), END] for n in lengths]


def random_corpus(lengths: list[int], seed: int = 0) -> EncodedCorpus:
    sides = random_sentences(lengths, seed), random_sentences([n + 1 for n in reversed(lengths)], seed + 1)
    return EncodedCorpus(Ragged.of(sides[0]), Ragged.of(sides[1]), np.arange(len(lengths)))


def drawn(batches: Batches, count: int) -> list[Batch]:
    """The batches of the next `count` updates."""
    return [batch for rank_batches in islice(batches, count) for batch in rank_batches.micro_batches]


def padded(sentences: list[list[int]], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences as one matrix and its mask, with `extra` more columns of padding."""
    width = max(map(len, sentences)) + extra
    ids = torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in sentences])
    return ids, ids != PAD


def tiny_batch(lengths: list[int] | None = None, seed: int = 0) -> Batch:
    corpus = random_corpus(lengths or [3, 5, 2, 7], seed)
    return corpus.batch(torch.arange(len(corpus)).numpy())


def begin(rows: int) -> torch.Tensor:
    return torch.full((rows, 1), BEGIN)


def saved_run(folder: Path, family: str, *overrides: str, seed: int = 0) -> Run:
    """A run whose best checkpoint is a tiny model that has learned nothing: it says anything, of any length."""
    config = tiny_config(family, "data=files", "data.train=[a.en,a.de]", "tokenizer.vocabulary=60", *overrides)
    animals = itertools.permutations(["dogs", "cats", "a cow", "the birds"])
    said = [f"Some {a} see {b}, {c} and {d}." for a, b, c, d in animals]
    tokenizer, _ = train_tokenizer(Corpus(said, [line.title() for line in said]), config.tokenizer)
    run, checkpoint = Run(folder), folder / "checkpoints" / "update-0000001"
    checkpoint.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, *overrides, vocabulary=tokenizer.vocabulary, seed=seed)
    write_config(config, checkpoint / "config.yaml")
    tokenizer.save(checkpoint)
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, checkpoint / WEIGHTS)
    (run.checkpoints / "index.json").write_text('{"last": "update-0000001", "best": "update-0000001"}')
    return run


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
    """Real text, where this machine has it: a folder with train, val and test .jsonl files."""
    for folder in (os.environ.get("MULTI30K"), REPOSITORY.parent / "shared" / "data" / "multi30k"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("Multi30k is not on this machine; name its folder in the variable MULTI30K")


Program = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The program as its users run it, in an empty folder."""

    def run(*arguments: str, input: str = "", cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return run_program(arguments, input, cwd)

    return run


def run_program(arguments: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_forked(arguments, given, folder) if hasattr(os, "fork") else run_anew(arguments, given, folder)


def run_anew(arguments: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m seq2seq`, which takes seconds to import torch."""
    command, text = [sys.executable, "-m", "seq2seq", *arguments], {"text": True, "encoding": "utf-8"}
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, timeout=600, **text)  # type: ignore[call-overload, no-any-return]


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
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
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
