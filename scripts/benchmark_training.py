"""Training speed beside what a user would pick instead: `python scripts/benchmark_training.py data=multi30k`.

One architecture (3 + 3 layers, width 256, feed-forward 1024, 4 heads, tied 8k vocabulary, dropout 0.2, label smoothing
0.1), one token budget, and the LSTM beside JoeyNMT's. JoeyNMT and this project run as their users run them, from text
to updates; MarianMTModel of Hugging Face gets this project's batches in a plain loop. Each runs in a process of its
own, in turn. Tokens are real target tokens, END included and padding not. Further words override the config:
`data.path=…`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import benchmarks
import numpy as np
import torch
import yaml
from peer_worker import sizes

from seq2seq.cli.main import load_config
from seq2seq.config.schema import TrainConfig
from seq2seq.data.batching import Batches
from seq2seq.data.corpus import open_corpora
from seq2seq.data.encoding import EncodedCorpus, encode_training
from seq2seq.data.tokenizer import END, Tokenizer, make_tokenizer

TOKENS = 4096
JOEYNMT = [
    "torch==2.13.0",
    "joeynmt==2.3.0",
    "sentencepiece==0.2.0",
    *("importlib_metadata", "packaging", "pyyaml", "tensorboard", "subword-nmt", "pandas", "matplotlib", "seaborn"),
]
HUGGING_FACE = ["torch==2.13.0", "transformers==5.23.0", "numpy", "sentencepiece", "ctranslate2==4.8.5"]
SAME = ("model.dropout=0.2", "model.attention.dropout=0.2", f"training.tokens={TOKENS}", "training.label_smoothing=0.1")
PEER = Path(__file__).with_name("peer_worker.py")


def config_of(model: str, overrides: list[str]) -> TrainConfig:
    config: TrainConfig = load_config("train", *overrides, f"model={model}", *SAME)
    return config


def prepare(config: TrainConfig, work: Path) -> tuple[EncodedCorpus, Tokenizer]:
    """The corpus as this project's subwords: batches for Hugging Face, texts and a vocabulary for JoeyNMT."""
    corpora = open_corpora(config.data, config.seed)
    tokenizer, _ = make_tokenizer(corpora.train, config.tokenizer, config.data.cache)
    encoded, _ = encode_training(corpora.train, tokenizer, config.data.max_length, config.data.cache)
    work.mkdir(parents=True, exist_ok=True)
    save_batches(Batches(encoded, TOKENS, config.seed), work)
    dropout = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.2)
    settings = {"vocab_size": tokenizer.vocabulary.target, **sizes(256, 1024, (3, 3), 4), **dropout}
    (work / "model.json").write_text(json.dumps({"norm_position": "post", "settings": settings}))
    for side, ids in (("source", encoded.source), ("target", encoded.target)):
        text = [" ".join(tokenizer.pieces(ids[i][:-1].tolist())) for i in range(len(encoded))]
        (work / f"train.{side}").write_text("\n".join(text) + "\n", encoding="utf-8")
        (work / f"dev.{side}").write_text("\n".join(text[:10]) + "\n", encoding="utf-8")
    ordinary = range(END + 1, tokenizer.vocabulary.target)
    (work / "vocabulary.txt").write_text("\n".join(tokenizer.pieces(ordinary)) + "\n", encoding="utf-8")
    return encoded, tokenizer


def save_batches(updates: Batches, folder: Path) -> None:
    """The first batches, for the plain loop of the peer."""
    arrays = {
        f"{i}.{side}": tensor.numpy()
        for i, rank_batches in enumerate(islice(updates, 60))
        for batch in rank_batches.micro_batches
        for side, tensor in (("source", batch.source_BS), ("target", batch.target_out_BT))
    }
    np.savez(folder / "batches.npz", **arrays)  # type: ignore[arg-type]


def joeynmt_config(family: str, work: Path) -> Path:
    """JoeyNMT's own configuration of the same model."""
    if family == "transformer":
        size = {"hidden_size": 256, "ff_size": 1024, "num_layers": 3, "num_heads": 4, "dropout": 0.2}
        part: dict[str, Any] = {"type": "transformer", "layer_norm": "pre", **size}
        encoder = decoder = {**part, "embeddings": {"embedding_dim": 256, "scale": True, "dropout": 0.2}}
    else:
        part = {"type": "recurrent", "rnn_type": "lstm", "hidden_size": 256, "num_layers": 1, "dropout": 0.2}
        part["embeddings"] = {"embedding_dim": 256, "dropout": 0.2}
        encoder = {**part, "bidirectional": True}
        decoder = {**part, "input_feeding": True, "attention": "bahdanau", "hidden_dropout": 0.2}
    side = {"max_length": 256, "level": "word", "lowercase": False, "voc_file": str(work / "vocabulary.txt")}
    settings = {
        "name": family,
        "model_dir": str(work / f"joeynmt-{family}"),
        "use_cuda": False,
        "data": {
            "train": str(work / "train"),
            "dev": str(work / "dev"),
            "dataset_type": "plain",
            "src": {"lang": "source", **side},
            "trg": {"lang": "target", **side},
        },
        "testing": {"beam_size": 1},
        "training": {
            "optimizer": "adamw",
            "scheduling": "warmupinversesquareroot",
            "learning_rate_warmup": 400,
            "learning_rate": 1e-3,
            "label_smoothing": 0.1,
            "loss": "crossentropy",
            "normalization": "tokens",
            "clip_grad_norm": 1.0,
            "batch_size": TOKENS,
            "batch_type": "token",
            "epochs": 100,
            "validation_freq": 100_000,
            "logging_freq": 5,
            "overwrite": True,
            "shuffle": True,
        },
        "model": {
            "initializer": "xavier_uniform",
            "tied_embeddings": family == "transformer",
            "tied_softmax": True,
            "encoder": encoder,
            "decoder": decoder,
        },
    }
    path = work / f"joeynmt-{family}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def speed_of(watched: benchmarks.Watched) -> dict[str, float]:
    """The median of the logged speeds; the first line, with what starts slowly, is left out."""
    speeds = [float(match[1].replace(",", "")) for match in watched.matches[1:]]
    return {"tokens_per_second": statistics.median(speeds), "peak_gb": watched.peak_gb}


def contestants(overrides: list[str], work: Path, peers: bool) -> dict[str, Callable[[], dict[str, float]]]:
    """Everything that takes part in a round, by the name it has in the table."""

    def own(model: str, *more: str) -> dict[str, float]:
        words = [*overrides, f"model={model}", *SAME, *more, "training.log_every=10", "training.updates=100000"]
        words += [f"outputs={work}", "name=own", "overwrite=true", "device=cpu", "training.validate_every=100000"]
        return speed_of(benchmarks.watch([sys.executable, "-m", "seq2seq", "train", *words], r"([\d,]+) tokens/s", 5))

    def bound() -> dict[str, float]:
        return benchmarks.measured(sys.executable, __file__, "--measure")

    taking_part: dict[str, Callable[[], dict[str, float]]] = {
        "this project": lambda: own("transformer"),
        "this project, one process": lambda: own("transformer", "processes=1"),
        "this project, float32": lambda: own("transformer", "precision=float32"),
        "this project, LSTM": lambda: own("lstm"),
        "this project, LSTM, one process": lambda: own("lstm", "processes=1"),
        "matrix rate": bound,
    }
    if peers:
        joeynmt = benchmarks.environment(work / "environments" / "joeynmt", JOEYNMT)
        hugging_face = benchmarks.environment(work / "environments" / "huggingface", HUGGING_FACE)

        def marian(precision: str) -> dict[str, float]:
            command = [str(hugging_face), str(PEER), "train", str(work), precision, "cpu"]
            return speed_of(benchmarks.watch(command, r"([\d,]+) tokens/s", 4))

        def joey(family: str) -> dict[str, float]:
            command = [str(joeynmt), "-m", "joeynmt", "train", str(joeynmt_config(family, work)), "--skip-test"]
            return speed_of(benchmarks.watch(command, r"Tokens per Sec: +(\d+)", 3))

        taking_part |= {
            "JoeyNMT 2.3.0": lambda: joey("transformer"),
            "Hugging Face MarianMTModel, float32": lambda: marian("float32"),
            "Hugging Face MarianMTModel, bf16": lambda: marian("bfloat16"),
            "JoeyNMT 2.3.0, LSTM": lambda: joey("recurrent"),
        }
    return taking_part


def operations(config: TrainConfig, encoded: EncodedCorpus, vocabulary: int) -> float:
    """Floating-point operations of training for each real target token of the corpus."""
    source, target = (side.lengths().astype(np.int64) for side in (encoded.source, encoded.target))
    squares = (int((source * source).sum()), int((target * target).sum()), int((source * target).sum()))
    forward = benchmarks.multiply_adds(config.model, vocabulary, int(source.sum()), int(target.sum()), squares)
    return 2 * 3 * forward / int(target.sum())


def start_up(overrides: list[str], work: Path, repeats: int) -> list[float]:
    """Seconds from the command to the first update, everything cached."""
    words = [*overrides, "model=transformer", *SAME, "training.log_every=1", "training.updates=100000", "device=cpu"]
    words += [f"outputs={work}", "name=own", "overwrite=true", "training.validate_every=100000"]
    command = [sys.executable, "-m", "seq2seq", "train", *words]
    return [benchmarks.watch(command, r"tokens/s", 1).seconds[0] for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument(
        "--work", type=Path, default=Path("data/benchmarks"), help="environments and intermediate files"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON and the picture"
    )
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--busy", action="store_true", help="while another program keeps one core busy")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=["data=multi30k"], help="config of the data")
    arguments = parser.parse_args()
    if arguments.measure:
        rates = {name: benchmarks.matmul_flops(getattr(torch, name)) for name in ("float32", "bfloat16")}
        print(json.dumps(rates))
        return
    work = arguments.work.resolve()
    configs = {model: config_of(model, arguments.overrides) for model in ("transformer", "lstm")}
    encoded, tokenizer = prepare(configs["transformer"], work)
    vocabulary = tokenizer.vocabulary.target
    needed = {model: operations(config, encoded, vocabulary) for model, config in configs.items()}
    taking_part = contestants(arguments.overrides, work, peers=not arguments.alone)
    with benchmarks.busy_core(arguments.busy):
        results = benchmarks.interleaved(arguments.repeats, taking_part)
    products = results.pop("matrix rate")
    rates = {kind: statistics.median(result[kind] for result in products) for kind in products[0]}
    starts = start_up(arguments.overrides, work, arguments.repeats)
    rows = summary(results, rates, needed)
    heads = ("", "target tokens/s", "lowest – highest", "this project is faster by", "of the bound", "peak memory, GB")
    shown = benchmarks.table(heads, rows)
    print(shown)
    print(
        f"\nMatrix products on this machine: {rates['float32'] / 1e9:,.0f} GFLOP/s in float32, "
        f"{rates['bfloat16'] / 1e9:,.0f} in bf16."
    )
    for model, count in needed.items():
        print(
            f"The {model} needs {count / 1e6:.1f} MFLOP for each target token: at the bf16 rate "
            f"{rates['bfloat16'] / count:,.0f} tokens/s, its bound."
        )
    print(f"From the command to the first update, everything cached: {statistics.median(starts):.1f} s")
    arguments.out.mkdir(parents=True, exist_ok=True)
    everything = {
        "machine": benchmarks.machine(),
        "results": results,
        "rates": rates,
        "operations": needed,
        "starts": starts,
    }
    (arguments.out / "training.json").write_text(json.dumps(everything, indent=1) + "\n")
    chart = [(name, _median(runs)) for name, runs in results.items()]
    benchmarks.bars(arguments.out / "training.svg", "Training on Multi30k, target tokens per second", chart)


def _median(runs: list[dict[str, float]], key: str = "tokens_per_second") -> float:
    return statistics.median(run[key] for run in runs)


def summary(results: dict[str, list[dict[str, float]]], rates: dict[str, float], needed: dict[str, float]) -> list[Any]:
    """A row for each contestant: ratios to this project's model of the same family, and the fraction of the bound."""
    rows = []
    for name, runs in results.items():
        speeds = [run["tokens_per_second"] for run in runs]
        lstm, speed = "LSTM" in name, statistics.median(speeds)
        own = _median(results["this project, LSTM" if lstm else "this project"])
        fraction = speed * needed["lstm" if lstm else "transformer"] / rates["bfloat16"]
        ratio = "" if name in ("this project", "this project, LSTM") else f"{own / speed:.1f} ×"
        spread = f"{min(speeds):,.0f} – {max(speeds):,.0f}"
        rows.append((name, f"{speed:,.0f}", spread, ratio, f"{fraction:.0%}", f"{_median(runs, 'peak_gb'):.2f}"))
    return rows


if __name__ == "__main__":
    main()
