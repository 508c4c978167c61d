"""How the cost of training grows: `python scripts/benchmark_growth.py`.

The default Transformer on synthetic sentences, one thing changed at a time: token budget, sentence length, vocabulary,
width, depth. Real target tokens a second and peak memory, each in a process of its own; the bound beside them is the
model's multiply-adds at the rate of matrix products measured in that process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import benchmarks
import torch

from seq2seq.cli.main import load_config
from seq2seq.utils.device import peak_memory, tune_cpu, tune_cuda

USUAL = {"tokens": 4096, "length": 16, "vocabulary": 8000, "width": 256, "layers": 3}
GROWTH = {
    "tokens": (512, 1024, 2048, 4096, 8192),
    "length": (8, 16, 32, 64, 128),
    "vocabulary": (2000, 8000, 32000, 64000),
    "width": (128, 256, 512, 768),
    "layers": (1, 3, 6, 12),
}
TITLES = {"tokens": "token budget", "length": "sentence length", "layers": "layers per side"}


def measure(tokens: int, length: int, vocabulary: int, width: int, layers: int) -> dict[str, float]:
    tune_cpu()
    tune_cuda()
    sizes = [f"model.width={width}", f"model.feed_forward={4 * width}", f"training.tokens={tokens}"]
    depth = [f"model.encoder_layers={layers}", f"model.decoder_layers={layers}"]
    config = load_config("train", "model=transformer", *sizes, *depth)
    device = torch.device("cpu")
    rate = benchmarks.matmul_flops(torch.bfloat16)
    encoded = benchmarks.synthetic(20_000, vocabulary, length)
    trainer = benchmarks.trainer_of(config, encoded, vocabulary, device)
    updates = iter(trainer.state.batches)
    for _ in range(3):
        trainer.update(next(updates))
    count, operations, began = 0, 0, time.perf_counter()
    while time.perf_counter() < began + 3:
        rank_batches = next(updates)
        trainer.update(rank_batches)
        count += rank_batches.target_tokens
        operations += benchmarks.operations(trainer, rank_batches)
    seconds = time.perf_counter() - began
    return {"speed": count / seconds, "bound": count / (operations / rate), "peak_gb": peak_memory(device) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON and the picture"
    )
    parser.add_argument("--measure", nargs=5, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for kind, values in GROWTH.items():
        found[kind] = []
        for value in values:
            settings = {**USUAL, kind: value}
            figures = benchmarks.measured(sys.executable, __file__, "--measure", *settings.values())
            found[kind].append({"value": value, **figures})
        rows = [
            ("target tokens/s", *(f"{point['speed']:,.0f}" for point in found[kind])),
            ("of the bound", *(f"{point['speed'] / point['bound']:.0%}" for point in found[kind])),
            ("peak memory, GB", *(f"{point['peak_gb']:.2f}" for point in found[kind])),
        ]
        print(benchmarks.table([TITLES.get(kind, kind), *(f"{value:,}" for value in values)], rows) + "\n", flush=True)
    panels = []
    for kind, points in found.items():
        curves = {name: [(p["value"], p[name]) for p in points] for name in ("speed", "bound")}
        panels.append((TITLES.get(kind, kind), "target tokens/s", curves))
    arguments.out.mkdir(parents=True, exist_ok=True)
    benchmarks.lines(arguments.out / "growth.svg", panels)
    everything = {"machine": benchmarks.machine(), "growth": found}
    (arguments.out / "growth.json").write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
