"""Kill a training at random moments, continue it each time, and compare it bit by bit with one never disturbed.

python scripts/kill_test.py                 50 × SIGKILL (every third while a checkpoint is written), 10 × SIGTERM,
                                            10 × a disk that is full while a checkpoint is written, and with two
                                            processes 10 × SIGKILL to the first and 10 × to the second
python scripts/kill_test.py --kills 5 --terms 2 --full 2 --forks 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from seq2seq.data.toy import splits
from seq2seq.utils.run import Run

SETTINGS = [
    *("model.width=32", "model.feed_forward=64", "model.encoder_layers=1", "model.decoder_layers=1"),
    *("tokenizer.vocabulary=200", "tokenizer.sampling=0.1", "training.tokens=400", "training.average=ema"),
    *("training.validate_every=20", "training.log_every=5", "training.examples=0"),
    *("data.train=[train.en,train.de]", "data.held_out=20"),
    *("search.length_extra=2", "search.length_factor=1", "optimizer.warmup=50"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="times the process is killed with signal 9")
    parser.add_argument("--terms", type=int, default=10, help="times it is asked to stop with SIGTERM")
    parser.add_argument("--full", type=int, default=10, help="times the disk is full when a checkpoint is written")
    parser.add_argument("--forks", type=int, default=10, help="times each of two processes is killed with signal 9")
    parser.add_argument("--updates", type=int, default=600, help="length of the training")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    options = parser.parse_args()
    SETTINGS.append(f"training.updates={options.updates}")
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as tmp_dir:
        folder = Path(tmp_dir)
        write_corpus(folder)
        train(folder, "whole").communicate()
        train(folder, "divided", 2).communicate()
        whole, divided = (Run(folder / "outputs" / name) for name in ("whole", "divided"))
        print(
            f"undisturbed: {len(list(whole.checkpoints.glob('update-*')))} checkpoints kept, {options.updates} updates"
        )
        right = []
        for name, count, processes, disturb in (
            ("SIGKILL", options.kills, 1, partial(kill, draw, signal.SIGKILL)),
            ("SIGTERM", options.terms, 1, partial(kill, draw, signal.SIGTERM)),
            ("full disk", options.full, 1, partial(fill, draw, largest(whole))),
            ("first of two", options.forks, 2, partial(kill, draw, signal.SIGKILL, processes=2)),
            ("second of two", options.forks, 2, partial(kill_fork, draw)),
        ):
            run = name.replace(" ", "-").lower()
            moments = [disturb(folder, run, turn) for turn in range(count)]
            finished = train(folder, run, processes)
            finished.communicate()
            different = compare(whole if processes == 1 else divided, Run(folder / "outputs" / run))
            when = ", ".join(f"{moments.count(kind)} {kind}" for kind in sorted(set(moments)))
            print(f"{name:13} × {count}: {when}; exit code at the end {finished.returncode}; ", end="")
            verdict = (
                f"DIFFERENT in {len(different)} values: {', '.join(different[:5])}" if different else "the same bits"
            )
            print(verdict, flush=True)
            right.append(not different and finished.returncode == 0)
    sys.exit(not all(right))


def write_corpus(folder: Path) -> None:
    """Write some pairs of the built-in corpus, so that starting and validating a run cost little."""
    pairs = splits()["train"][:2000]
    for side, lines in (("en", [pair.source for pair in pairs]), ("de", [pair.target for pair in pairs])):
        (folder / f"train.{side}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def train(folder: Path, name: str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "seq2seq", "train", f"name={name}", f"processes={processes}", *SETTINGS]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )


def kill(draw: random.Random, number: signal.Signals, folder: Path, name: str, turn: int, processes: int = 1) -> str:
    """Let it live for a while, or until it writes a checkpoint → when the signal came."""
    process = train(folder, name, processes)
    checkpoints = folder / "outputs" / name / "checkpoints"
    before, began = newest(checkpoints), time.monotonic()
    if turn % 3 == 0:
        while process.poll() is None and not any(checkpoints.glob(".update-*/*")):
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.01)
        when = "while a checkpoint was written"
    else:
        # From the first import on, until a few checkpoints later.
        wait = draw.random() * 6 if turn % 3 == 1 else 60
        while process.poll() is None and time.monotonic() - began < wait and newest(checkpoints) in (before, ""):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.5)
        when = "while training" if newest(checkpoints) != before else "before the next checkpoint"
    ended = process.poll() is not None
    forks = forks_of(process.pid)
    process.send_signal(number)
    process.communicate()
    return "after the end" if ended else f"{when}{outliving(forks)}"


def kill_fork(draw: random.Random, folder: Path, name: str, turn: int) -> str:
    """Kill the second process at a random moment; the first must report it in one line and end."""
    process = train(folder, name, 2)
    while process.poll() is None and not forks_of(process.pid):
        time.sleep(0.01)
    time.sleep(draw.random() * 3)
    for fork in forks_of(process.pid):
        os.kill(fork, signal.SIGKILL)
    _, errors = process.communicate()
    if not process.returncode:
        return "after the end"
    lines = errors.splitlines()
    reported = len(lines) == 1 and lines[0].startswith("error: process 2 of 2 was killed")
    return "reported in one line" if reported else f"exit {process.returncode} with {len(lines)} lines {lines[-1:]}"


def forks_of(process: int) -> list[int]:
    with suppress(OSError):
        return [int(fork) for fork in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


def outliving(processes: list[int], seconds: float = 5) -> str:
    """Wait until processes have ended; say so where one has not."""
    ends = time.monotonic() + seconds
    while any(alive(process) for process in processes):
        if time.monotonic() > ends:
            return f" (a fork lives after {seconds} s)"
        time.sleep(0.05)
    return ""


def alive(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def newest(checkpoints: Path) -> str:
    return max((path.name for path in checkpoints.glob("update-*")), default="")


def largest(run: Run) -> int:
    return max(file.stat().st_size for file in run.checkpoint("last").iterdir())


def fill(draw: random.Random, size: int, folder: Path, name: str, turn: int) -> str:
    """No file may grow beyond some part of the largest one of a checkpoint; the run must report it in one line.

    Between two such turns it goes on for a while, so that other checkpoints meet the full disk.
    """
    limit = draw.randrange(1_000, size)
    process = train(folder, name, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = process.communicate()
    lines = errors.splitlines()
    kill(draw, signal.SIGTERM, folder, name, 2)
    if process.returncode and lines and all(line.startswith("error: ") for line in lines):
        return "reported in one line"
    return f"exit {process.returncode} with {len(lines)} lines {lines[-1:]}"


def compare(one: Run, other: Run) -> list[str]:
    """What differs between two runs, seconds and file dates left out."""
    different = []
    for which in ("last", "best"):
        a, b = one.checkpoint(which), other.checkpoint(which)
        for file in ("model.safetensors", "averaged.safetensors"):
            x, y = load_file(a / file), load_file(b / file)
            different += [f"{which}/{file}/{key}" for key in x if not torch.equal(x[key], y[key])]
        x, y = (torch.load(folder / "training.pt", weights_only=True) for folder in (a, b))
        for state in (x, y):
            state |= {f"progress.{name}": value for name, value in state.pop("progress").items()}
        different += [f"{which}/{key}" for key in x if key != "progress.seconds" and not same(x[key], y[key])]
    losses = [[(line["update"], line["loss"]) for line in map(json.loads, run.metrics.open())] for run in (one, other)]
    first = next((pair for pair in itertools.zip_longest(*losses) if pair[0] != pair[1]), None)
    return different + ([f"metrics.jsonl, {first[0]} → {first[1]}"] if first else [])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


if __name__ == "__main__":
    main()
