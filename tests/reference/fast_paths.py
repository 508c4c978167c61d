"""The plain form of each fast path, written to be read; it takes the fast one's name while it is compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.data.encoding import Batch
from seq2seq.decoding import beam, processors, scoring
from seq2seq.inference import translator
from seq2seq.model import attention, layers, layout, lstm
from seq2seq.model.cpu_inference import optimize_for_cpu
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Decoded, Seq2Seq
from seq2seq.training import loss, pipeline


def drawn_mask(x: Tensor, p: float) -> Tensor:
    """A random number drawn for each element."""
    return (torch.rand(x.shape, device=x.device) >= p).to(x.dtype) / (1 - p)


def all_logits(model: Seq2Seq, features_MD: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Torch's cross-entropy over float32 logits of all words at once."""
    targets_M = batch.target_out_BT[batch.target_mask_BT]
    logits_MV = model.logits(features_MD).float()
    return F.cross_entropy(logits_MV, targets_M, reduction="sum", label_smoothing=smoothing)


def indexed(self: layout.Packed, x_RTD: Tensor) -> Tensor:
    return x_RTD.flatten(0, 1)[self.index_M]


@dataclass(frozen=True)
class PrefixState(State):
    first: State  # before the first token
    prefix_RT: Tensor

    def select(self, rows_R: Tensor, beam: int) -> PrefixState:
        first, prefix_RT = self.first.select(rows_R, beam), self.prefix_RT[rows_R]
        return replace(self, first=first, prefix_RT=prefix_RT, beam=beam)

    def reorder(self, rows_R: Tensor) -> PrefixState:
        return replace(self, first=self.first.reorder(rows_R), prefix_RT=self.prefix_RT[rows_R])

    def join(self, other: PrefixState) -> PrefixState:
        prefix_RT = torch.cat((self.prefix_RT, other.prefix_RT))
        return replace(self, first=self.first.join(other.first), prefix_RT=prefix_RT)


def read_again(fast_start: Callable[..., State], fast_decode: Callable[..., Decoded]) -> tuple[Any, Any]:
    """A decoder without a cache: each step decodes the whole prefix again."""

    def start(self: Seq2Seq, source_BS: Tensor, mask_BS: Tensor) -> PrefixState:
        return PrefixState(fast_start(self, source_BS, mask_BS), source_BS.new_empty(len(source_BS), 0))

    def decode(self: Seq2Seq, target_RT: Tensor, state: PrefixState, weights: bool = False) -> Decoded:
        prefix_RT, T = torch.cat((state.prefix_RT, target_RT), 1), target_RT.shape[1]
        features_RTD, _, attention_weights = fast_decode(self, prefix_RT, state.first, weights)
        after = replace(state, prefix_RT=prefix_RT, length=state.length + T)
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

    def recur(self: lstm.Decoder, target_RTE: Tensor, state: lstm.LSTMState, weights: bool) -> Any:
        hidden, contexts, attention_weights = [], [], []
        for target_R1E in target_RTE.split(1, 1):
            hidden_R1D, context_R1D, first, weights_RN1S = fast(self, target_R1E, state, weights)
            state = replace(state, layers=(first, *state.layers[1:]), length=state.length + 1)
            hidden.append(hidden_R1D)
            contexts.append(context_R1D)
            attention_weights += weights_RN1S
        return (
            torch.cat(hidden, 1),
            torch.cat(contexts, 1),
            first,
            (torch.cat(attention_weights, 2),) if weights else (),
        )

    return recur


def in_int8(model: Seq2Seq, int8: bool = False) -> Seq2Seq:
    """Products in int8, whatever the precision asked for."""
    return optimize_for_cpu(model.float(), int8=True)


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
    "real tokens selected by index": FastPath(((layout.Packed, "pack", indexed),)),
    "freed memory kept": FastPath(((pipeline, "tune_cpu", lambda: None),)),
    "the encoder's recurrence as one kernel": FastPath(((nn.LSTM, "forward", cell_by_cell),), family="lstm"),
    "work taken out of the decoder's recurrence": FastPath(
        ((lstm.Decoder, "_attend_and_recur", word_by_word(lstm.Decoder._attend_and_recur)),), family="lstm"
    ),
    "search: weights reordered once": FastPath(((translator, "optimize_for_cpu", lambda model, int8=False: model),)),
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
# Off by default on a CPU; the tests enable them.
OTHER_WAY = {
    "packing": FastPath(overrides=("training.packing=true",)),
    "int8": FastPath(((translator, "optimize_for_cpu", in_int8),)),
    "torch's fused attention": FastPath(((attention, "use_fused_kernel", lambda query_RNTH: True),)),
}
EVERY = {**PATHS, **OTHER_WAY}


def do_without(names: Sequence[str], set_: Callable[[Any, str, Any], None] = setattr) -> list[str]:
    """Install the plain forms, and return the overrides to add to the command line."""
    for name in names:
        for target, attribute, plain in EVERY[name].plain:
            set_(target, attribute, plain)
    return [word for name in names for word in EVERY[name].overrides]
