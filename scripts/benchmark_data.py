"""How reading, encoding and batching grow with the corpus: `python scripts/benchmark_data.py`.

Writes corpora of several sizes into a temporary folder; each figure is taken in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from seq2seq.cli.main import load_config
from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import Batches
from seq2seq.data.corpus import open_corpora
from seq2seq.data.encoding import encode_training
from seq2seq.data.toy import splits

TOKENS = 4096


def write_corpus(folder: Path, pairs: int) -> None:
    """Distinct pairs of two grammar sentences and a number."""
    sentences, chance = splits()["train"], random.Random(1)
    with open(folder / "c.en", "w", encoding="utf-8") as source, open(folder / "c.de", "w", encoding="utf-8") as target:
        for number in range(pairs):
            first, second = sentences[int(chance.random() * 20000)], sentences[int(chance.random() * 20000)]
            source.write(f"{first.source} {second.source} {number}\n")
            target.write(f"{first.target} {second.target} {number}\n")


def config_of(folder: Path) -> TrainConfig:
    config: TrainConfig = load_config(
        "train", "data=files", f"data.train=[{folder}/c.en,{folder}/c.de]", f"data.cache={folder}/cache"
    )
    return config


def open_all(folder: Path) -> Batches:
    from seq2seq.data.tokenizer import make_tokenizer

    config = config_of(folder)
    corpora = open_corpora(config.data, config.seed)
    tokenizer, _ = make_tokenizer(corpora.train, config.tokenizer, config.data.cache)
    encoded, _ = encode_training(corpora.train, tokenizer, config.data.max_length, config.data.cache)
    return Batches(encoded, TOKENS, config.seed)


def measure(what: str, folder: Path) -> dict[str, float]:
    """One figure, in this process."""
    if what == "train":
        return {"batches_per_second": training_speed(folder)}
    peak = watch_memory()
    began = time.perf_counter()
    batches = open_all(folder)
    opened = time.perf_counter() - began
    next(iter(batches))
    first = time.perf_counter() - began
    batches_per_second = 0.0
    if what == "epoch":
        began, count = time.perf_counter(), 0
        for _ in batches:
            count += 1
            if batches.epoch:
                break
        batches_per_second = count / (time.perf_counter() - began)
    return {"opened": opened, "first_batch": first, "batches_per_second": batches_per_second, "peak_gb": peak()}


def watch_memory() -> Callable[[], float]:
    """The highest memory of this process from now on, in GB, without file pages that the kernel can drop at will."""
    peaks = [0.0]

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            peaks.append(max(peaks.pop(), int(status.partition("RssAnon:")[2].split()[0]) / 2**20))
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    return lambda: peaks[0]


def training_speed(folder: Path, updates: int = 12) -> float:
    """Batches a second that the default Transformer takes in."""
    import torch

    from seq2seq.data.tokenizer import Vocabulary
    from seq2seq.model.factory import build_model
    from seq2seq.training.loss import loss_sum
    from seq2seq.utils.device import choose_device, choose_precision, tune_cpu, tune_cuda

    tune_cpu()
    tune_cuda()
    device, _ = choose_device("auto")
    precision, _ = choose_precision("auto", device)
    model = build_model(config_of(folder).model, Vocabulary(8000, 8000, True)).to(device, precision)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    began = 0.0
    for number, rank_batches in enumerate(islice(open_all(folder), updates + 2)):
        if number == 2:
            began = time.perf_counter()
        loss_sum(model, rank_batches.micro_batches[0].to(device), 0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return updates / (time.perf_counter() - began)


def in_a_process(what: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[30_000, 300_000, 3_000_000], help="pairs")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    heads = ("pairs", "first start, s", "pairs/s", "its peak, GB", "second start, s", "epoch peak, GB", "batches/s")
    print("| " + " | ".join(heads) + " |\n" + "| ---: " * len(heads) + "|")
    training = None
    for size in sorted(arguments.sizes):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_corpus(folder, size)
            first, second, epoch = (in_a_process(what, folder) for what in ("first", "second", "epoch"))
            training = training or in_a_process("train", folder)["batches_per_second"]
        row = f"| {size:,} | {first['opened']:.1f} | {size / first['opened']:,.0f} | {first['peak_gb']:.2f} "
        row += f"| {second['first_batch']:.1f} | {epoch['peak_gb']:.2f} | {epoch['batches_per_second']:,.0f} |"
        print(row, flush=True)
    print(f"\nThe default Transformer trains on {training:.2f} batches of {TOKENS:,} tokens a second on this machine.")


if __name__ == "__main__":
    main()
