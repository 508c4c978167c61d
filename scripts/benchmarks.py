"""Shared by the benchmarks: environments for peers, watched processes, the machine's matrix rate, tables, pictures."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from seq2seq.config.schema import ModelConfig, TrainConfig, TransformerConfig
from seq2seq.data.batching import Batches, RankBatches
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import END, Vocabulary
from seq2seq.model.factory import build_model
from seq2seq.training.checkpoint import Progress, RunState
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup
from seq2seq.training.length import settle_length
from seq2seq.training.optimizers import build_optimizer
from seq2seq.training.schedule import settle_rate
from seq2seq.training.trainer import Trainer
from seq2seq.utils.device import memory_of

Key = TypeVar("Key", str, tuple[str, str])
REPOSITORY = Path(__file__).resolve().parent.parent


def environment(folder: Path, packages: Sequence[str]) -> Path:
    """A virtual environment with these packages, built once → its Python."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = folder / "installed.txt"
    if not installed.exists() or installed.read_text() != "\n".join(packages):
        print(f"building {folder} with {' '.join(packages)} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stdout=sys.stderr)
        installed.write_text("\n".join(packages))
    return python


@dataclass(frozen=True)
class Watched:
    """A process that was stopped after some lines: what they matched, when, and its peak memory."""

    matches: list[re.Match[str]]
    seconds: list[float]  # since the command
    peak_gb: float


def watch(command: Sequence[str | Path], pattern: str, count: int) -> Watched:
    """Run a command until `count` of its lines match a pattern; its memory is what the kernel counted."""
    began, lines = time.perf_counter(), []
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    matches: list[re.Match[str]] = []
    seconds = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if match := re.search(pattern, line):
            matches.append(match)
            seconds.append(time.perf_counter() - began)
            if len(matches) == count:
                break
    peak_gb = _peak_gb(process.pid)
    process.kill()
    process.wait()
    process.stdout.close()
    if len(matches) < count:
        raise RuntimeError(f"{' '.join(map(str, command))} ended early:\n{''.join(lines[-20:])}")
    return Watched(matches, seconds, peak_gb)


def _peak_gb(process: int) -> float:
    """The most memory a running process has held so far; not a number where the kernel does not report it.

    Of a process and its forks, what they hold together now: this project's processes return nothing to the kernel.
    """
    status, children = Path(f"/proc/{process}/status"), Path(f"/proc/{process}/task/{process}/children")
    forks = [int(fork) for fork in children.read_text().split()] if children.exists() else []
    if forks:
        return memory_of([process, *forks]) / 2**30
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**20 if found else math.nan


def measured(python: Path | str, script: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script prints on its last line, from a process of its own."""
    command = [str(python), script, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def matmul_flops(dtype: torch.dtype, device: str = "cpu", size: int = 2048, seconds: float = 1.0) -> float:
    """Floating-point operations a second in a product of two square matrices: two for each multiply-add."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rounds, spent = 0, 0.0
    for warm in (False, True):
        began = time.perf_counter()
        rounds = 0
        while (spent := time.perf_counter() - began) < seconds:
            for _ in range(50 if device != "cpu" else 1):
                a @ b
                rounds += 1
            if device != "cpu":
                torch.cuda.synchronize()
        if warm:
            break
    return 2 * size**3 * rounds / spent


def multiply_adds(config: ModelConfig, vocabulary: int, source: int, target: int, squares: tuple[int, int, int]) -> int:
    """Multiply-adds of a forward pass: `source` and `target` tokens, and the sums of S², T² and S·T over the pairs.

    Only matrix products count: projections of D × D, feed-forward layers, scores and weighted sums of the attention,
    recurrent gates and the vocabulary. Training takes three times as many: forward, and two products backward.
    """
    source_square, target_square, cross = squares
    if isinstance(config, TransformerConfig):
        D, F = config.width, config.feed_forward * (3 if config.activation == "swiglu" else 2)
        encoder = source * (4 * D * D + D * F) + 2 * D * source_square
        decoder = target * (6 * D * D + D * F) + source * 2 * D * D + 2 * D * (target_square + cross)
        layers = config.encoder_layers * encoder + config.decoder_layers * decoder
        return layers + target * D * vocabulary
    E, W = config.embedding, config.width
    widths = [E] + [2 * W] * (config.encoder_layers - 1)
    encoder = source * sum(2 * 4 * W * (width + W) for width in widths)
    attention = source * 2 * W * W + target * W * W + cross * (W + 2 * W)
    decoder = target * (4 * W * (E + 2 * W + W) + (config.decoder_layers - 1) * 4 * W * (3 * W + W))
    readout = target * ((3 * W + E) * 2 * E + E * vocabulary)
    return encoder + attention + decoder + readout


def operations(trainer: Trainer, rank_batches: RankBatches) -> int:
    """Floating-point operations of an update: two for each multiply-add, and three times the forward pass."""
    model, total = trainer.state.config.model, 0
    for batch in rank_batches.micro_batches:
        source_B, target_B = (mask.numpy().sum(1) for mask in (batch.source_mask_BS, batch.target_mask_BT))
        squares = (int((source_B**2).sum()), int((target_B**2).sum()), int((source_B * target_B).sum()))
        vocabulary = len(trainer.state.model.output.weight)
        total += multiply_adds(model, vocabulary, int(source_B.sum()), int(target_B.sum()), squares)
    return 6 * total


def synthetic(pairs: int, vocabulary: int, length: float = 27.0) -> EncodedCorpus:
    """Pairs of random ids whose sides have this mean length, spread as in newspapers, and are about equally long."""
    random = np.random.default_rng(1)
    spread = 0.55
    source = np.exp(random.normal(math.log(length) - spread**2 / 2, spread, pairs)).clip(2, 4.5 * length)
    target = (source * np.exp(random.normal(0.0, 0.15, pairs))).clip(2, 5 * length)
    sides = []
    for lengths in (source.astype(np.int64), target.astype(np.int64)):
        flat = random.integers(END + 1, vocabulary, lengths.sum(), dtype=np.int32)
        flat[np.cumsum(lengths) - 1] = END
        sides.append(Ragged(flat, np.cumsum(lengths)))
    return EncodedCorpus(sides[0], sides[1], np.arange(pairs, dtype=np.int64))


def trainer_of(
    config: TrainConfig,
    encoded: EncodedCorpus,
    vocabulary: int,
    device: torch.device,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Trainer:
    """The real trainer without saving, logging or validation: for its updates alone."""
    torch.manual_seed(1)
    config = settle_rate(config)
    model = build_model(config.model, Vocabulary(vocabulary, vocabulary, joint=True)).to(device)
    batches = Batches(encoded, int(config.training.tokens), config.seed, rank=group.rank, world_size=group.world_size)
    optimizer = build_optimizer(model, config.optimizer)
    nothing: Any = None
    state = RunState(settle_length(config, batches), nothing, model, optimizer, batches, Progress(), None, group)
    return Trainer(state, torch.bfloat16, nothing, nothing, nothing)


def machine() -> dict[str, str]:
    """What the figures depend on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text())[1]  # type: ignore[index]
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, figures to the right."""
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


OWN = "this project"
COLOURS = ("#2b6cb0", "#c05621")
Curves = dict[str, list[tuple[float, float]]]


def bars(path: Path, title: str, rows: Sequence[tuple[str, float]]) -> None:
    """Horizontal bars in the order given, as SVG; this project's in a colour of their own."""
    names, values = zip(*rows, strict=True)
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.3 * len(rows)), layout="constrained")
    drawn = axes.barh(names, values, color=[COLOURS[not name.startswith(OWN)] for name in names])
    axes.bar_label(drawn, fmt="{:,.0f}", padding=4)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[:].set_visible(False)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    save(figure, path)


def lines(path: Path, panels: Sequence[tuple[str, str, Curves]]) -> None:
    """Panels (x label, y label, curves) beside each other, x on a logarithmic scale, as SVG."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.8 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for axes, (x_label, y_label, curves) in zip(grid.flat, panels, strict=False):
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=4, label=name)
        ticks = sorted({x for curve in curves.values() for x, _ in curve})
        axes.set(xscale="log", xlabel=x_label, ylabel=y_label, ylim=(0, None))
        axes.set_xticks(ticks, [f"{round(x, 1):,g}" for x in ticks])
        axes.tick_params(labelsize="small")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Save as an SVG with real text whose bytes depend on the figure alone."""
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@contextmanager
def busy_core(busy: bool = True) -> Iterator[None]:
    """Keep one core busy with another process meanwhile, as on a shared machine; not `busy`: leave it alone."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def interleaved(repeats: int, contestants: Mapping[Key, Callable[[], Any]]) -> dict[Key, list[Any]]:
    """Each contestant once in every round, so that a disturbance of the machine meets them all."""
    results: dict[Key, list[Any]] = {name: [] for name in contestants}
    for round_ in range(1, repeats + 1):
        for name, run in contestants.items():
            print(
                f"round {round_} of {repeats}: {name if isinstance(name, str) else ', '.join(name)} …", file=sys.stderr
            )
            results[name].append(run())
    return results
