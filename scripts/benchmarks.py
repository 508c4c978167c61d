"""What the benchmarks share: environments for peers, watched processes, the machine's matrix rate, tables, pictures."""

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
from dataclasses import dataclass
from datetime import date
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from seq2seq.config.schema import ModelConfig, TrainConfig, TransformerConfig
from seq2seq.data.batching import Batches, RankBatches
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.store import Ragged
from seq2seq.data.tokenizer import END, Vocabulary
from seq2seq.model.factory import build_model
from seq2seq.training.checkpoint import Progress, RunState
from seq2seq.training.distributed import ProcessGroup
from seq2seq.training.optimizers import build_optimizer
from seq2seq.training.trainer import Trainer

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
    environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY)}
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
    """The most memory a running process has held so far; not a number where the kernel does not tell."""
    status = Path(f"/proc/{process}/status")
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
    """Floating-point operations of an update: a multiply-add is two, and the way back is twice the way forth."""
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


def trainer_of(config: TrainConfig, encoded: EncodedCorpus, vocabulary: int, device: torch.device) -> Trainer:
    """The trainer as it is, with nothing to save, to say or to validate: for its updates."""
    torch.manual_seed(1)
    model = build_model(config.model, Vocabulary(vocabulary, vocabulary, joint=True)).to(device)
    batches = Batches(encoded, int(config.training.tokens), config.seed)
    optimizer = build_optimizer(model, config.optimizer)
    nothing: Any = None
    state = RunState(config, nothing, model, optimizer, batches, Progress(), None, ProcessGroup())
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
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b83280", "#718096", "#975a16", "#2c7a7b")


def bars(path: Path, title: str, rows: Sequence[tuple[str, float]], unit: str) -> None:
    """Horizontal bars in the order given, as SVG; this project's in a colour of their own."""
    height, most = 26, max(value for _, value in rows)
    parts = [_text(10, 22, title, "bold 15px")]
    for i, (label, value) in enumerate(rows):
        y, length = 40 + i * height, 400 * value / most
        parts.append(_text(250, y + 14, label, anchor="end"))
        parts.append(
            f'<rect x="258" y="{y}" width="{length:.1f}" height="18" fill="{COLOURS[not label.startswith(OWN)]}"/>'
        )
        parts.append(_text(264 + length, y + 14, f"{value:,.0f} {unit}"))
    _svg(path, 800, 50 + len(rows) * height, parts)


def lines(path: Path, panels: Sequence[tuple[str, str, str, dict[str, list[tuple[float, float]]]]]) -> None:
    """Panels (title, x label, y label, curves of points) beside each other, x on a logarithmic scale, as SVG."""
    parts = []
    columns = min(3, len(panels))
    for i, (title, x_label, y_label, curves) in enumerate(panels):
        left, top, width, height = 60 + i % columns * 330, 40 + i // columns * 300, 240, 180
        points = [point for curve in curves.values() for point in curve]
        low, high = (math.log(f(x for x, _ in points)) for f in (min, max))
        most = _round_number(max(y for _, y in points))

        def place(x: float, y: float, box: tuple[float, ...] = (left, top, width, height, low, high, most)) -> str:
            left, top, width, height, low, high, most = box
            share = (math.log(x) - low) / ((high - low) or 1)
            return f"{left + width * share:.1f},{top + height * (1 - y / most):.1f}"

        parts.append(_text(left, top - 14, title, "bold 13px"))
        parts.append(f'<path d="M{left},{top} V{top + height} H{left + width}" fill="none" stroke="#444"/>')
        for tick in range(5):
            y = most * tick / 4
            parts.append(
                _text(
                    left - 5,
                    top + height * (1 - tick / 4) + 4,
                    f"{y:,.3g}" if most < 100 else f"{y:,.0f}",
                    anchor="end",
                    font="10px",
                )
            )
        for x in sorted({x for x, _ in points}):
            parts.append(_text(float(place(x, 0).split(",")[0]), top + height + 14, f"{x:,.0f}", "10px", "middle"))
        parts.append(_text(left + width / 2, top + height + 30, f"{x_label} → {y_label}", "11px", "middle"))
        for j, (name, curve) in enumerate(curves.items()):
            colour = COLOURS[j % len(COLOURS)]
            path_ = " ".join(place(x, y) for x, y in curve)
            parts.append(f'<polyline points="{path_}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{c[0]}" cy="{c[1]}" r="3" fill="{colour}"/>' for c in _places(path_)]
            parts.append(
                _text(left + 4 + j % 2 * 125, top + height + 46 + j // 2 * 14, f"● {name}", "11px", colour=colour)
            )
    _svg(path, 60 + columns * 330, 40 + -(-len(panels) // columns) * 300, parts)


def _round_number(least: float) -> float:
    """The end of an axis: the next number that four ticks divide well."""
    size = 10.0 ** math.floor(math.log10(least))
    return next(size * step for step in (1, 2, 4, 6, 8, 10) if size * step >= least)


def _places(path: str) -> Iterator[list[str]]:
    return (pair.split(",") for pair in path.split())


def _text(x: float, y: float, text: str, font: str = "13px", anchor: str = "start", colour: str = "#222") -> str:
    style = f"font:{font} sans-serif" if "px" in font else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(path: Path, width: int, height: int, parts: Sequence[str]) -> None:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"]))


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
