"""Train the same run with one thing changed at a time, at equal updates, and print what each change brought.

python scripts/ablate.py data=multi30k data.path=FOLDER                    every variant once, seed 1
python scripts/ablate.py data=multi30k --seeds 3 --only plain "R-Drop 5"   two of them, three seeds each
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

from seq2seq.utils.run import Run

BASE = ["model=transformer_tiny", "training.updates=600", "training.tokens=4096", "training.validate_every=200"]
VARIANTS = {
    "plain": [],
    "no dropout": ["model.dropout=0", "model.attention.dropout=0"],
    "no smoothing": ["training.label_smoothing=0"],
    "word dropout 0.1": ["model.word_dropout=0.1"],
    "layer dropout 0.1": ["model.layer_dropout=0.1"],
    "subword sampling 0.1": ["tokenizer.sampling=0.1"],
    "R-Drop 5": ["training.r_drop=5"],
    "SimCut 3": ["training.simcut=3"],
    "running mean": ["training.average=ema", "training.ema_decay=0.99"],
    "last checkpoints": ["training.average=last", "training.average_checkpoints=3"],
    "muon": ["optimizer=muon"],
    "schedule-free": ["optimizer=schedule_free"],
    "adafactor": ["optimizer=adafactor"],
    "float32": ["precision=float32"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help=", ".join(VARIANTS)
    )
    parser.add_argument("--outputs", default="outputs/ablation")
    options, overrides = parser.parse_known_args()
    print("| variant | validation loss | BLEU | chrF | seconds |\n| --- | --- | --- | --- | --- |", flush=True)
    for variant in options.only:
        found = [train(variant, seed, options.outputs, overrides) for seed in range(1, options.seeds + 1)]
        means = {key: spread([one[key] for one in found]) for key in ("loss", "bleu", "chrf", "seconds")}
        print(f"| {variant} | " + " | ".join(means.values()) + " |", flush=True)


def train(variant: str, seed: int, outputs: str, overrides: list[str]) -> dict[str, float]:
    """The last validation of a run, and the seconds that its training took."""
    name = f"{variant.replace(' ', '-')}-{seed}"
    where = [f"name={name}", f"outputs={outputs}", f"seed={seed}", "overwrite=true"]
    began = time.perf_counter()
    command = [sys.executable, "-m", "seq2seq", "train", *BASE, *VARIANTS[variant], *where, *overrides]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(status)  # the training has printed its error
    metrics = Run.find(name, outputs).metrics.read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, metrics) if line["kind"] == "validation"][-1]
    return {**last, "seconds": time.perf_counter() - began}


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
