"""What each fast path buys, and that none changes what is learned.

python scripts/fast_paths.py                      the built-in corpus: every fast path on, each one off, all off
python scripts/fast_paths.py --laws               the tests of models, training and search with all of them off
python scripts/fast_paths.py --model lstm training.updates=200 data=multi30k     another model, length, corpus

Every fast path has a plain form here, written to be read; it takes the place of the fast one in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import benchmarks
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.cli import main as cli
from seq2seq.data.encoding import Batch
from seq2seq.decoding import beam, processors, scoring
from seq2seq.model import attention, layers, lstm
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Decoded, Seq2Seq
from seq2seq.training import loss
from seq2seq.training import pipeline as training
from seq2seq.utils.run import Run

LAWS = ("test_attention", "test_model", "test_search", "test_training", "test_translator")


def drawn_mask(x: Tensor, p: float) -> Tensor:
    """A random number drawn for each element."""
    return (torch.rand(x.shape, device=x.device) >= p).to(x.dtype) / (1 - p)


def all_logits(model: Seq2Seq, features_MD: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Torch's cross-entropy over float32 logits of all words at once."""
    targets_M = batch.target_out_BT[batch.target_mask_BT]
    logits_MV = model.logits(features_MD).float()
    return F.cross_entropy(logits_MV, targets_M, reduction="sum", label_smoothing=smoothing)


def indexed(self: layers.Packing, x_RTD: Tensor) -> Tensor:
    return x_RTD.flatten(0, 1)[self.index_M]


def read_again(fast_start: Callable[..., State], fast_decode: Callable[..., Decoded]) -> tuple[Any, Any]:
    """A decoder without a cache: each step decodes the whole prefix again."""

    def start(self: Seq2Seq, source_BS: Tensor, mask_BS: Tensor) -> State:
        state = fast_start(self, source_BS, mask_BS)
        return replace(state, history=(state.history, source_BS.new_empty(len(source_BS), 0)))

    def decode(self: Seq2Seq, target_RT: Tensor, state: State, weights: bool = False) -> Decoded:
        inner, prefix_RT = state.history
        prefix_RT, T = torch.cat((prefix_RT, target_RT), 1), target_RT.shape[1]
        features_RTD, _, attention_weights = fast_decode(
            self, prefix_RT, replace(state, history=inner, length=0), weights
        )
        after = state.advance((inner, prefix_RT), T)
        return Decoded(features_RTD[:, -T:], after, tuple(w_RNTS[:, :, -T:] for w_RNTS in attention_weights))

    return start, decode


def best_of_all(
    x_RV: Tensor, log_probability_BK: Tensor, count: int, normalizer_R1: Tensor | None = None
) -> scoring.Candidates:
    """The best of a whole sorted row."""
    (B, K), V = log_probability_BK.shape, x_RV.shape[1]
    all_BX = (
        (x_RV if normalizer_R1 is None else x_RV - normalizer_R1).view(B, K, V) + log_probability_BK[:, :, None]
    ).flatten(1)
    value_BC, index_BC = all_BX.sort(1, descending=True)
    value_BC, index_BC = value_BC[:, :count], index_BC[:, :count]
    return scoring.Candidates(value_BC, value_BC, index_BC % V, index_BC // V)


def cell_by_cell(self: Any, x_BSD: Tensor, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
    """An LSTM as its equations say."""
    h_BD, c_BD = (x[0] for x in start) if start else (x_BSD.new_zeros(len(x_BSD), self.hidden_size) for _ in range(2))
    hidden = []
    for x_BD in x_BSD.unbind(1):
        gates_BD = F.linear(x_BD, self.weight_ih_l0, self.bias_ih_l0) + F.linear(
            h_BD, self.weight_hh_l0, self.bias_hh_l0
        )
        h_BD, c_BD = lstm.lstm_cell(gates_BD, c_BD)
        c_BD = c_BD.to(x_BD.dtype)
        hidden.append(h_BD)
    return torch.stack(hidden, 1), (h_BD[None], c_BD[None])


def word_by_word(fast: Callable[..., Any]) -> Any:
    """The recurrence of a decoder with all of its work inside."""

    def recur(self: lstm.Decoder, target_RTE: Tensor, state: State, weights: bool) -> Any:
        hidden, contexts, attention_weights = [], [], []
        for target_R1E in target_RTE.split(1, 1):
            hidden_R1D, context_R1D, (h_RD, c_RD), weights_RN1S = fast(self, target_R1E, state, weights)
            state = state.advance(state.history._replace(hidden_RD=h_RD, cell_RD=c_RD), 1)
            hidden.append(hidden_R1D)
            contexts.append(context_R1D)
            attention_weights += weights_RN1S
        return (
            torch.cat(hidden, 1),
            torch.cat(contexts, 1),
            (h_RD, c_RD),
            (torch.cat(attention_weights, 2),) if weights else (),
        )

    return recur


@dataclass(frozen=True)
class FastPath:
    """A fast path: its plain replacements, and the overrides that disable it."""

    plain: tuple[tuple[Any, str, Any], ...] = ()
    overrides: tuple[str, ...] = ()
    family: str = ""  # the only one that has it


READ_AGAIN = read_again(Seq2Seq.start, Seq2Seq.decode)
PATHS = {
    "bfloat16, weights cast once an update": FastPath(overrides=("precision=float32",)),
    "cross-entropy in one pass, in chunks": FastPath(((loss, "cross_entropy", all_logits),)),
    "dropout masks from one table": FastPath(((layers, "_dropout_mask", drawn_mask),)),
    "real tokens selected by index": FastPath(((layers.Packing, "pack", indexed),)),
    "freed memory kept": FastPath(((training, "tune_cpu", lambda: None),)),
    "the encoder's recurrence as one kernel": FastPath(((nn.LSTM, "forward", cell_by_cell),), family="lstm"),
    "work taken out of the decoder's recurrence": FastPath(
        ((lstm.Decoder, "_attend_and_recur", word_by_word(lstm.Decoder._attend_and_recur)),), family="lstm"
    ),
    "search: weights reordered once": FastPath(((Seq2Seq, "prepare", lambda self: self),)),
    "search: key-value cache": FastPath(((Seq2Seq, "start", READ_AGAIN[0]), (Seq2Seq, "decode", READ_AGAIN[1]))),
    "search: top candidates without sorting": FastPath(
        (
            (processors, "top_candidates", best_of_all),
            (beam, "top_candidates", best_of_all),
            (processors, "log_sum_exp", lambda x_RV: x_RV.logsumexp(-1, keepdim=True)),
        )
    ),
    "search: sentences together": FastPath(((beam, "WAIT_FRACTION", 0.0),), ("search.tokens=1",)),
}
# Off unless asked for, or on a GPU: here they are put on.
OTHER_WAY = {
    "packing": FastPath(overrides=("training.packing=true",)),
    "torch's fused attention": FastPath(((attention, "use_fused_kernel", lambda query_RNTH: True),)),
}
EVERY = {**PATHS, **OTHER_WAY}


def do_without(names: list[str]) -> list[str]:
    """Install the plain forms, and return the overrides to add to the command line."""
    for name in names:
        for target, attribute, plain in EVERY[name].plain:
            setattr(target, attribute, plain)
    return [word for name in names for word in EVERY[name].overrides]


def pytest_configure() -> None:
    """Pytest loads this file as a plugin: all tests without fast paths."""
    do_without(list(PATHS))


def laws() -> int:
    tests = [benchmarks.REPOSITORY / "tests" / f"{name}.py" for name in LAWS]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(benchmarks.REPOSITORY)])}
    # Two laws are about fast paths themselves: that sentences wait for the next batch, and what is laid out once.
    others = "not that_wait and not laid_out"
    command = [sys.executable, "-m", "pytest", "-p", "fast_paths", "-k", others, *map(str, tests)]
    return subprocess.run(command, env=environ, check=False).returncode


def run(model: str, without: list[str], number: int, overrides: list[str]) -> dict[str, float]:
    """A training in a process of its own → its last validation loss, its test score, and its seconds an update."""
    name = f"{model}-{number}"
    words = [f"name={name}", "outputs=outputs/fast_paths", "overwrite=true", f"model={model}", *overrides]
    subprocess.run(
        [sys.executable, __file__, "--run", json.dumps(without), *words], check=True, stdout=subprocess.DEVNULL
    )
    found = Run.find(name, "outputs/fast_paths")
    metrics = map(json.loads, found.metrics.read_text(encoding="utf-8").splitlines())
    validations = [line for line in metrics if line["kind"] == "validation"]
    result = json.loads(found.result.read_text(encoding="utf-8"))
    return {
        "loss": validations[-1]["loss"],
        "validation": sum(line["seconds"] for line in validations) / len(validations),
        "update": 1000 * result["progress"]["seconds"] / result["progress"]["update"],
        **{key: result["test"][key] for key in ("bleu", "bleu_interval")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laws", action="store_true", help="run the tests instead")
    parser.add_argument("--model", default="transformer")
    parser.add_argument("--ends", action="store_true", help="only with all of them, and with none")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options, overrides = parser.parse_known_args()
    if options.laws:
        raise SystemExit(laws())
    if options.run is not None:
        sys.argv = ["seq2seq", "train", *overrides, *do_without(options.run)]
        cli.main()
        return
    has = [name for name, path in EVERY.items() if not path.family or options.model.startswith(path.family)]
    contestants: dict[str, list[str]] = {"as it is": []} | {
        (f"without: {n}" if n in PATHS else f"with: {n}"): [n] for n in has
    }
    contestants["without any"] = [name for name in has if name in PATHS]
    if options.ends:
        contestants = {name: contestants[name] for name in ("as it is", "without any")}
    rows = []
    for number, (name, without) in enumerate(contestants.items()):
        print(name, file=sys.stderr, flush=True)
        found = run(options.model, without, number, overrides)
        rows.append(
            (
                name,
                f"{found['loss']:.3f}",
                f"{found['bleu']:.2f} ± {found['bleu_interval']:.2f}",
                f"{found['update']:,.0f}",
                f"{found['validation']:.1f}",
            )
        )
    heads = (options.model, "validation loss", "test BLEU", "ms an update", "s a validation")
    print(benchmarks.table(heads, rows))


if __name__ == "__main__":
    main()
