"""Decoding speed beside CTranslate2 and Hugging Face: `python scripts/benchmark_decoding.py --run NAME`.

The same trained Transformer everywhere: here in bfloat16, float32 and int8; exported for CTranslate2 (float32, and
int8 with all threads on a batch or one on each of several); its weights copied into the model of Hugging Face with the
same parts: MarianMTModel for post-norm layers, Pegasus for pre-norm ones. Text to text, the whole test set and single
sentences, greedy and beam 5, each in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import benchmarks
import numpy as np
import torch
from benchmark_training import HUGGING_FACE
from peer_worker import measure, sizes
from safetensors.torch import save_file
from torch import Tensor

from seq2seq.config.loading import search_preset
from seq2seq.config.schema import SearchConfig, TransformerConfig
from seq2seq.data.corpus import Corpus, load_split
from seq2seq.data.tokenizer import FILES
from seq2seq.evaluation.metrics import sacrebleu_metric, tokenizer_of
from seq2seq.evaluation.testsets import relocate
from seq2seq.inference.checkpoint import load_checkpoint
from seq2seq.inference.ctranslate2 import save_ctranslate2
from seq2seq.inference.translator import Translator
from seq2seq.model.interface import Seq2Seq
from seq2seq.utils.device import tune_cpu, tune_cuda
from seq2seq.utils.run import Run

PEER = Path(__file__).with_name("peer_worker.py")
BEAMS = {"greedy": 1, "beam 5": 5}


# --------------------------------------------------------------------------------------- the same weights


def copy_to_hugging_face(model: Seq2Seq, config: TransformerConfig, folder: Path, **more: float) -> None:
    """Weights under Hugging Face's names; this project's projections of queries and keys have no bias, so zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Tensor] = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {}
    shared = {"attention": "self_attn", "self_attention": "self_attn", "cross_attention": "encoder_attn"}
    norms = {"attention_residual": "self_attn", "self_residual": "self_attn", "cross_residual": "encoder_attn"}
    for side, count in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        tensors |= {f"model.{side}.layer_norm.{k}": own[f"{side}.norm.{k}"] for k in ("weight", "bias") if pre(config)}
        tensors[f"model.{side}.embed_positions.weight"] = positions(model, config)
        for i in range(count):
            own_layer, peer_layer = f"{side}.layers.{i}", f"model.{side}.layers.{i}"
            for part in (name for name in shared if f"{own_layer}.{name}.query.weight" in own):
                for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out")):
                    weight = own[f"{own_layer}.{part}.{name}.weight"]
                    bias = own.get(f"{own_layer}.{part}.{name}.bias", torch.zeros(config.width))
                    target = f"{peer_layer}.{shared[part]}.{letter}_proj"
                    tensors |= {f"{target}.weight": weight, f"{target}.bias": bias}
            for kind in ("weight", "bias"):
                for part in (name for name in norms if f"{own_layer}.{name}.norm.weight" in own):
                    tensors[f"{peer_layer}.{norms[part]}_layer_norm.{kind}"] = own[f"{own_layer}.{part}.norm.{kind}"]
                tensors[f"{peer_layer}.final_layer_norm.{kind}"] = own[f"{own_layer}.feed_forward_residual.norm.{kind}"]
                tensors[f"{peer_layer}.fc1.{kind}"] = own[f"{own_layer}.feed_forward.inner.{kind}"]
                tensors[f"{peer_layer}.fc2.{kind}"] = own[f"{own_layer}.feed_forward.outer.{kind}"]
    tensors["model.shared.weight"] = own["source_embedding.weight"]
    save_file(
        {name: t.detach().float().clone().contiguous() for name, t in tensors.items()}, folder / "model.safetensors"
    )
    layers = (config.encoder_layers, config.decoder_layers)
    size = sizes(config.width, config.feed_forward, layers, config.attention.heads, config.activation)
    described = {"vocab_size": len(own["source_embedding.weight"]), **size, **more}
    (folder / "model.json").write_text(json.dumps({"norm_position": config.norm_position, "settings": described}))


def pre(config: TransformerConfig) -> bool:
    return config.norm_position == "pre"


@torch.no_grad()
def positions(model: Seq2Seq, config: TransformerConfig) -> Tensor:
    return model.encoder.input.position(torch.zeros(1, 512, config.width))[0]  # type: ignore[attr-defined]


def prepare(run: str, outputs: str, data_path: str | None, work: Path) -> tuple[Corpus, str]:
    """The peers' models in `work`; the test set, also as a file of sources; and BLEU's tokenizer for it."""
    checkpoint = Run.find(run, outputs).checkpoint("best")
    stored, tokenizer, model = load_checkpoint(checkpoint)
    config = stored.model
    if not isinstance(config, TransformerConfig) or config.tie_embeddings != "all" or config.position != "sinusoidal":
        raise SystemExit(
            "--run: the copy into Hugging Face needs a Transformer, tie_embeddings=all and position=sinusoidal"
        )
    # First, because int8 scales the weights in place.
    copy_to_hugging_face(model, config, work / "huggingface")
    for side in FILES:
        (work / "huggingface" / f"{side}.model").write_bytes(tokenizer.models[side])
    for quantization in ("float32", "int8"):
        folder = work / f"ctranslate2-{quantization}"
        folder.mkdir(parents=True, exist_ok=True)
        save_ctranslate2(model.eval(), config, tokenizer, folder, quantization)
    data = relocate(stored.data, data_path) if data_path else stored.data
    corpus = load_split(data, "test", stored.seed)
    assert corpus is not None
    (work / "test.txt").write_text("\n".join(corpus.source[:]), encoding="utf-8")
    return corpus, data.tokenize or tokenizer_of(data.target or "")


# ------------------------------------------------------------------------------------------- measuring


def measure_own(checkpoint: str, precision: str, processes: str, file: str, beam: int, alone: int) -> dict[str, Any]:
    translator = own_translator(checkpoint, precision, processes)
    search = replace(search_preset("beam"), beam=beam)
    return measure(partial(texts, translator, search), Path(file).read_text(encoding="utf-8").split("\n"), alone)


def own_translator(checkpoint: str, precision: str = "auto", processes: str = "auto") -> Translator:
    tune_cpu()
    tune_cuda()
    return Translator.from_checkpoint(Path(checkpoint), "cpu", precision).use_processes(processes)


def texts(translator: Translator, search: SearchConfig, sentences: Any) -> list[str]:
    return [found[0].text for found in translator.translate(list(sentences), search)]


def growth(checkpoint: str, file: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Sentences a second against batch size, beam and length, each from the median of three."""
    translator = own_translator(checkpoint)
    sentences = sorted(Path(file).read_text(encoding="utf-8").split("\n"), key=lambda text: len(text.split()))

    def speed(some: list[str], beam: int, batch: int = 0) -> float:
        search = replace(search_preset("beam"), beam=beam)
        parts = [some[i : i + batch] for i in range(0, len(some), batch)] if batch else [some]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for part in parts:
                texts(translator, search, part)
            times.append(time.perf_counter() - began)
        return len(some) / statistics.median(times)

    def whole_batches(size: int) -> list[str]:
        count = size * max(1, 40 // size)
        return few[:: len(few) // count][:count]

    few = sentences[::4]
    speed(few, 5)
    fifths = [list(part) for part in np.array_split(np.array(sentences, object), 5)]
    lengths = [statistics.mean(len(ids) for ids in translator.tokenizer.encode_source(part)) for part in fifths]
    kinds = BEAMS.items()
    return {
        # Batches of every size from sentences of all lengths.
        "batch": {k: [(n, speed(whole_batches(n), beam, n)) for n in (1, 4, 16, 64, 250)] for k, beam in kinds},
        "beam": {"all": [(beam, speed(few, beam)) for beam in (1, 2, 5, 10, 20)]},
        "length": {
            k: [(length, speed(part, beam)) for length, part in zip(lengths, fifths, strict=True)] for k, beam in kinds
        },
    }


def contestants(
    run: str, lstm: str | None, outputs: str, work: Path, alone: int
) -> dict[tuple[str, str], Callable[[], Any]]:
    """Everything that takes part in a round, by name and search."""
    peers = benchmarks.environment(work.parent / "environments" / "huggingface", HUGGING_FACE)
    file = str(work / "test.txt")
    own = {
        "this project": (run, "auto", "auto"),
        "this project, one process": (run, "auto", 1),
        "this project, float32": (run, "float32", "auto"),
        "this project, int8": (run, "int8", "auto"),
    }
    if lstm:
        own |= {"this project, LSTM": (lstm, "auto", "auto"), "this project, LSTM, int8": (lstm, "int8", "auto")}
    taking_part: dict[tuple[str, str], Callable[[], Any]] = {}
    for search, beam in BEAMS.items():
        for name, (which, precision, processes) in own.items():
            checkpoint = Run.find(which, outputs).checkpoint("best")
            arguments = ("--measure", checkpoint, precision, processes, file, beam, alone)
            taking_part[name, search] = partial(benchmarks.measured, sys.executable, __file__, *arguments)
        for name, kind, folder in (
            ("CTranslate2, float32", "ctranslate2", "ctranslate2-float32"),
            ("CTranslate2, int8", "ctranslate2", "ctranslate2-int8"),
            ("CTranslate2, int8 per thread", "ctranslate2-workers", "ctranslate2-int8"),
            ("Hugging Face, float32", "huggingface", "huggingface"),
        ):
            peer_arguments = (kind, work / folder, file, beam, alone)
            taking_part[name, search] = partial(benchmarks.measured, peers, str(PEER), *peer_arguments)
    return taking_part


def summary(
    results: dict[tuple[str, str], list[dict[str, Any]]], references: list[str], bleu: Any
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for (name, search), runs in results.items():
        speed, first = speed_of(runs), runs[0]["outputs"]
        same = results["this project, float32", search][0]["outputs"]
        equal = sum(a == b for a, b in zip(first, same, strict=True)) / len(same)
        score = bleu.corpus_score(first, [references]).score
        latencies = sorted(1000 * latency for run in runs for latency in run["latencies"])
        own = speed_of(results["this project", search])
        middle, late = (latencies[int(len(latencies) * quantile)] for quantile in (0.5, 0.95))
        int8 = speed_of(results["this project, int8", search])
        ratio, int8_ratio = (
            "" if name.startswith("this project") else f"{other / speed:.2f} ×" for other in (own, int8)
        )
        alone = (f"{middle:.1f}", f"{late:.1f}")
        shown = "" if "LSTM" in name else f"{equal:.1%}"
        rows.append((f"{name}, {search}", f"{speed:,.0f}", ratio, int8_ratio, f"{score:.2f}", shown, *alone))
    return rows


def speed_of(runs: list[dict[str, Any]]) -> float:
    return len(runs[0]["outputs"]) / statistics.median(run["seconds"] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required="--measure" not in sys.argv, help="a trained Transformer")
    parser.add_argument("--lstm", help="a trained LSTM")
    parser.add_argument("--outputs", default="outputs", help="folder that holds the runs")
    parser.add_argument("--data-path", help="where the run's corpus lies, if it has moved")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--alone", type=int, default=50, help="sentences for the latency of a single one")
    parser.add_argument("--busy", action="store_true", help="keep one core busy meanwhile")
    parser.add_argument(
        "--work", type=Path, default=Path("data/benchmarks"), help="environments and intermediate files"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of JSON and pictures")
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--growth", nargs=2, help=argparse.SUPPRESS)
    if "--growth" in sys.argv:
        print(json.dumps(growth(*sys.argv[2:])))
        return
    arguments = parser.parse_args()
    if arguments.measure:
        checkpoint, precision, processes, file, beam, alone = arguments.measure
        print(json.dumps(measure_own(checkpoint, precision, processes, file, int(beam), int(alone))))
        return
    work = arguments.work.resolve() / "decoding"
    corpus, tokenize = prepare(arguments.run, arguments.outputs, arguments.data_path, work)
    bleu = sacrebleu_metric("bleu", tokenize)
    taking_part = contestants(arguments.run, arguments.lstm, arguments.outputs, work, arguments.alone)
    with benchmarks.busy_core(arguments.busy):
        results = benchmarks.interleaved(arguments.repeats, taking_part)
    heads = (
        "",
        "sentences/s",
        "this project is faster by",
        "its int8 is faster by",
        "BLEU",
        "equal to own float32",
        "one sentence, ms",
        "95 %, ms",
    )
    print(benchmarks.table(heads, summary(results, list(corpus.target), bleu)))
    print(f"\nBLEU: {bleu.get_signature()}")
    checkpoint = str(Run.find(arguments.run, arguments.outputs).checkpoint("best"))
    grown = benchmarks.measured(sys.executable, __file__, "--growth", checkpoint, work / "test.txt")
    for kind, curves in grown.items():
        for search, points in curves.items():
            print(f"\nSentences a second against {kind}, {search}")
            print(
                benchmarks.table([kind, *(f"{x:,.3g}" for x, _ in points)], [["", *(f"{y:,.0f}" for _, y in points)]])
            )
    slim = {
        " ".join(key): [{k: v for k, v in run.items() if k != "outputs"} for run in runs]
        for key, runs in results.items()
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    everything = {"machine": benchmarks.machine(), "results": slim, "growth": grown}
    (arguments.out / "decoding.json").write_text(json.dumps(everything, indent=1) + "\n")
    chart = [(", ".join(key), speed_of(runs)) for key, runs in results.items()]
    benchmarks.bars(arguments.out / "decoding.svg", "Decoding Multi30k's test set, sentences per second", chart)
    panels = [(kind, "sentences/s", curves) for kind, curves in grown.items()]
    benchmarks.lines(arguments.out / "decoding-growth.svg", panels)


if __name__ == "__main__":
    main()
