"""Training and decoding on one GPU, in under 8 minutes: `python scripts/benchmark_gpu.py`.

Needs no data: sentences of random ids, as long as those of newspapers. Transformer base and big and the large LSTM
train in bfloat16, eager and compiled, padded and packed, through the trainer's own updates. Base also trains without
dropout in attention, where packed sentences attend as they are, without prefetching, and on all GPUs; it decodes
greedily and with a beam of 4, with its steps as CUDA graphs too. Hugging Face and CTranslate2, where they are installed
in the same environment, train and decode base on the same batches. Tokens are real target tokens, padding not counted.
Utilisation: the model's multiply-adds against the rate of a matrix product on it. Without a GPU everything runs small
on the CPU, to try the code; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks
import numpy as np
import torch
from benchmark_decoding import copy_to_hugging_face
from benchmark_training import PEER, save_batches, speed_of

from seq2seq.cli.main import load_config
from seq2seq.config.loading import search_preset
from seq2seq.config.schema import TrainConfig, TransformerConfig
from seq2seq.data.batching import Batches, split_by_token_budget
from seq2seq.data.encoding import EncodedCorpus
from seq2seq.data.tokenizer import BEGIN, END, PAD, UNKNOWN, Vocabulary
from seq2seq.decoding.beam import beam_search
from seq2seq.decoding.scoring import DecodingTask, Specials
from seq2seq.inference.ctranslate2 import SPECIAL_PIECES, save_weights
from seq2seq.inference.step_graphs import StepGraphs
from seq2seq.inference.translator import token_budget
from seq2seq.model.factory import build_model
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.distributed import join_processes
from seq2seq.training.memory_check import try_batch
from seq2seq.training.prefetch import iterate
from seq2seq.utils.device import matmul_flops, out_of_memory, peak_memory, tune_cpu, tune_cuda
from seq2seq.utils.errors import reason_of

GPU = torch.cuda.is_available()
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if GPU else "cpu")
VOCABULARY, TOKENS, PAIRS = (32_000, 25_000, 200_000) if GPU else (500, 512, 2_000)
SMALL = () if GPU else ("model.encoder_layers=1", "model.decoder_layers=1", "model.attention.heads=2", "model.width=32")
MODELS = {"Transformer base": "transformer_base", "Transformer big": "transformer_big", "LSTM large": "lstm_large"}
BEAMS = {"greedy": 1, "beam 4": 4}
PEERS = {"Hugging Face": "transformers", "CTranslate2": "ctranslate2"}  # the module of each
LATE = "not measured: no time left"
FORMS = {"utilisation": ".1%", "peak_gb": ".1f"}
WARM_UP = 10 if GPU else 2  # updates
TOGETHER = 60 if GPU else 4  # updates of several processes, which take the same number
SECONDS = 8.0 if GPU else 1.0  # of measuring for each row


def config_of(preset: str, *more: str) -> TrainConfig:
    small = [*SMALL, "model.feed_forward=64"] if SMALL and preset.startswith("transformer") else list(SMALL)
    words = [f"model={preset}", f"training.tokens={TOKENS}", *small, "precision=bfloat16", *more]
    config: TrainConfig = load_config(
        "train", *words, *(["model.embedding=32"] if SMALL and preset == "lstm_large" else [])
    )
    return config


class How(NamedTuple):
    """How a model trains."""

    compiled: bool = False
    packed: bool = False
    attention_dropout: bool = True
    prefetched: bool = True

    def __str__(self) -> str:
        words = ["compiled" if self.compiled else "eager", "packed" if self.packed else "padded"]
        words += [] if self.attention_dropout else ["no dropout in attention"]
        return ", ".join(words if self.prefetched else [*words, "no prefetching"])

    @property
    def overrides(self) -> list[str]:
        packing = f"training.packing={self.packed}".lower()
        return [packing] if self.attention_dropout else [packing, "model.attention.dropout=0"]


def train(preset: str, encoded: EncodedCorpus, how: How, rate: float, deadline: float) -> dict[str, float]:
    """Real target tokens a second of one model, with all that an update is."""
    trainer = benchmarks.trainer_of(config_of(preset, *how.overrides), encoded, VOCABULARY, DEVICE)
    if how.compiled and "failed" in (report := trainer.compile(try_batch)):
        raise RuntimeError(report)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    same_on_cpu = copy.copy(trainer.state.batches)
    updates = iterate(trainer.state.batches, DEVICE) if how.prefetched else iter(trainer.state.batches)
    for _ in range(WARM_UP):  # kernels are chosen and compiled, the allocator finds its size
        trainer.update(next(updates))
    tokens, count, began = 0, 0, _now()
    while time.perf_counter() < min(began + SECONDS, deadline):
        rank_batches = next(updates)
        trainer.update(rank_batches)
        tokens, count = tokens + rank_batches.target_tokens, count + 1
    seconds = _now() - began
    measured = itertools.islice(same_on_cpu, WARM_UP, WARM_UP + count)
    operations = sum(benchmarks.operations(trainer, rank_batches) for rank_batches in measured)
    return {
        "tokens_per_second": tokens / seconds,
        "utilisation": operations / seconds / rate,
        "peak_gb": peak_memory(DEVICE) / 1e9,
    }


def train_together() -> None:
    """One of several processes that train base; the first prints the real target tokens a second of all."""
    with join_processes(DEVICE) as group:
        encoded = benchmarks.synthetic(PAIRS, VOCABULARY)
        trainer = benchmarks.trainer_of(config_of("transformer_base"), encoded, VOCABULARY, DEVICE, group)
        updates, tokens = iterate(trainer.state.batches, DEVICE), 0
        for _ in range(WARM_UP):
            trainer.update(next(updates))
        began = _now()
        for _ in range(TOGETHER):
            rank_batches = next(updates)
            trainer.update(rank_batches)
            tokens += rank_batches.target_tokens
        if group.is_main:
            print(json.dumps({"tokens_per_second": tokens / (_now() - began)}), flush=True)


def start_together(count: int) -> dict[str, float]:
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", __file__, "--together"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def random_model(config: TrainConfig) -> Seq2Seq:
    torch.manual_seed(1)
    return build_model(config.model, Vocabulary(VOCABULARY, VOCABULARY, joint=True)).eval()


def sources(encoded: EncodedCorpus, beam: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Padded batches to decode, shortest first."""
    rows = np.arange(2**14 if GPU else 32)
    rows = rows[np.argsort(encoded.source.lengths(rows), kind="stable")]
    budget = (token_budget(replace(search_preset("beam"), beam=beam), DEVICE) if GPU else 512) // beam
    for cut in split_by_token_budget(encoded.source.lengths(rows), budget):
        yield torch.from_numpy(encoded.source.padded(rows[cut], PAD)).to(device)


@torch.inference_mode()
def decode(encoded: EncodedCorpus, beam: int, graphs: bool) -> dict[str, float]:
    """Target tokens a second of base. Nothing is learned, so no sentence ends: each gets its source's length."""
    model = random_model(config_of("transformer_base")).to(DEVICE, torch.bfloat16)
    specials, tokens = Specials(BEGIN, END, (PAD, UNKNOWN, BEGIN)), 0
    search = replace(search_preset("beam"), beam=beam)
    step = StepGraphs(model.step, DEVICE).step if graphs else model.step

    def run(source_BS: torch.Tensor) -> int:
        length_B = (source_BS != PAD).sum(1)
        state = model.start(source_BS, source_BS != PAD)
        task = DecodingTask(length_B, torch.zeros_like(length_B), length_B, [0] * len(length_B))
        found = beam_search(step, [(state, task)], search, specials)
        return sum(len(hypotheses[0].ids) + 1 for hypotheses in found)

    run(next(sources(encoded, beam, DEVICE)))
    began = _now()
    for source_BS in sources(encoded, beam, DEVICE):
        tokens += run(source_BS)
        if time.perf_counter() > began + 4 * SECONDS:
            break
    return {"tokens_per_second": tokens / (_now() - began)}


def prepare_peers(encoded: EncodedCorpus, folder: Path) -> None:
    """Base with random weights as the peers read it, batches to train on, and batches to decode."""
    config = config_of("transformer_base")
    assert isinstance(config.model, TransformerConfig)
    model, dropout = random_model(config), config.model.dropout
    more = {"dropout": dropout, "attention_dropout": config.model.attention.dropout, "activation_dropout": dropout}
    copy_to_hugging_face(model, config.model, folder, **more)
    if importlib.util.find_spec("ctranslate2"):
        pieces = [SPECIAL_PIECES.get(i, str(i)) for i in range(VOCABULARY)]
        save_weights(model, config.model, pieces, pieces, folder, "float32")
    save_batches(Batches(encoded, TOKENS, config.seed), folder)
    for beam in BEAMS.values():
        decoded = {str(i): ids.numpy() for i, ids in enumerate(sources(encoded, beam, torch.device("cpu")))}
        np.savez(folder / f"decoding-{beam}.npz", **decoded)  # type: ignore[arg-type]


def train_peer(folder: Path) -> dict[str, float]:
    command = [sys.executable, str(PEER), "train", str(folder), "bfloat16", DEVICE.type]
    return {"tokens_per_second": speed_of(benchmarks.watch(command, r"([\d,]+) tokens/s", 5))["tokens_per_second"]}


def decode_peer(peer: str, beam: int, folder: Path) -> dict[str, float]:
    precision = "bfloat16" if GPU else "float32"  # CTranslate2 has bfloat16 on few CPUs
    arguments = (f"{PEERS[peer]}-ids", folder, beam, precision, DEVICE.type, SECONDS)
    return benchmarks.measured(sys.executable, str(PEER), *arguments)


def where_time_goes(encoded: EncodedCorpus) -> str:
    """The operations of three updates of base, longest first."""
    trainer = benchmarks.trainer_of(config_of("transformer_base"), encoded, VOCABULARY, DEVICE)
    updates = iterate(trainer.state.batches, DEVICE)
    for _ in range(5):
        trainer.update(next(updates))
    with torch.profiler.profile() as profile:
        for _ in range(3):
            trainer.update(next(updates))
        _now()
    order = "self_cuda_time_total" if GPU else "self_cpu_time_total"
    return str(profile.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))


def _now() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def peer_rows(encoded: EncodedCorpus, deadline: float) -> Iterator[dict[str, Any]]:
    base = "Transformer base"
    searches: list[tuple[str, str, Any]] = [(f"{base}, training", "Hugging Face", train_peer)]
    searches += [
        (f"{base}, {name}", peer, partial(decode_peer, peer, beam)) for name, beam in BEAMS.items() for peer in PEERS
    ]
    with tempfile.TemporaryDirectory() as folder:
        prepare_peers(encoded, Path(folder))
        for name, peer, measure in searches:
            if not importlib.util.find_spec(PEERS[peer]):
                yield {"model": name, "how": peer, "failed": f"not measured: {PEERS[peer]} is not installed"}
            elif time.perf_counter() > deadline - 60:
                yield {"model": name, "how": peer, "failed": LATE}
            else:
                yield row_of(name, peer, measure, Path(folder))


def row_of(name: str, how: str, measure: Any, *arguments: Any) -> dict[str, Any]:
    """One row, or why it is missing: a compiler that fails or memory that is too small ends no benchmark."""
    began = time.perf_counter()
    try:
        result: dict[str, Any] = measure(*arguments)
    except Exception as error:  # whatever a compiler may raise
        reason = "out of memory" if out_of_memory(error) else reason_of(error, limit=80)
        result = {"failed": f"{type(error).__name__}: {reason}"}
    torch._dynamo.reset()
    if GPU:
        torch.cuda.empty_cache()
    return {"model": name, "how": how, **result, "took": time.perf_counter() - began}


def rows_of(encoded: EncodedCorpus, rate: float, deadline: float) -> Iterator[dict[str, Any]]:
    """Training eagerly, decoding, peers, all GPUs, and last what takes a compiler."""
    base = "Transformer base"
    every = [(name, How(packed=packed)) for name, packed in itertools.product(MODELS, (False, True))]
    every += [(base, How(packed=packed, attention_dropout=False)) for packed in (False, True)]
    every += [(base, How(prefetched=False))]
    compiled = [(name, How(compiled=True, packed=packed)) for name, packed in itertools.product(MODELS, (False, True))]

    def trained(name: str, how: How) -> dict[str, Any]:
        if time.perf_counter() > deadline - 90:
            return {"model": f"{name}, training", "how": str(how), "failed": LATE}
        return row_of(f"{name}, training", str(how), train, MODELS[name], encoded, how, rate, deadline)

    yield from itertools.starmap(trained, every)
    for (search, beam), graphs in itertools.product(BEAMS.items(), (False, True)):
        yield row_of(f"{base}, {search}", "graphs" if graphs else "eager", decode, encoded, beam, graphs)
    yield from peer_rows(encoded, deadline)
    if (count := torch.cuda.device_count() if GPU else 2) > 1 and time.perf_counter() < deadline - 90:
        yield row_of(f"{base}, training", f"eager, padded, {count} processes", start_together, count)
    yield from itertools.starmap(trained, compiled)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return row["model"], row["how"], row["failed"], "", ""
    utilisation, peak = (f"{row[key]:{form}}" if key in row else "" for key, form in FORMS.items())
    return row["model"], row["how"], f"{row['tokens_per_second']:,.0f}", utilisation, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="what does not fit into them is left out")
    parser.add_argument("--together", action="store_true", help=argparse.SUPPRESS)  # one of several processes
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder of the JSON")
    arguments = parser.parse_args()
    tune_cpu()
    tune_cuda()
    if not GPU:
        torch.set_num_threads(1)  # for products so small
    if arguments.together:
        return train_together()
    deadline = time.perf_counter() + 60 * arguments.minutes
    machine, encoded, rate = (
        benchmarks.machine(),
        benchmarks.synthetic(PAIRS, VOCABULARY),
        matmul_flops(DEVICE, torch.bfloat16),
    )
    print("  ".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"bfloat16 matrix products: {rate / 1e12:,.2f} TFLOP/s{'' if GPU else '; no GPU: a trial of the code only'}")
    profile, rows = where_time_goes(encoded), []
    for row in rows_of(encoded, rate, deadline):
        print(f"{row['took']:5.0f} s  {row['model']}, {row['how']}" if "took" in row else row, flush=True)
        rows.append(row)
    heads = ("", "how", "target tokens/s", "utilisation", "peak memory, GB")
    print("\n" + benchmarks.table(heads, [cells(row) for row in rows]))
    print(f"\nWhere three updates of base spend their time:\n{profile}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    everything = {"machine": machine, "rate": rate, "rows": rows, "profile": profile}
    (arguments.out / "gpu.json").write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
