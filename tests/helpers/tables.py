"""Models that are tables: logits and attention are a pure function of the sentence and the prefix.

The torch side keeps a hash of the prefix in the decoder state, as a network keeps its cache; the numpy side computes it
from the prefix. So hundreds of searches run in a second, and state that follows the wrong hypothesis shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seq2seq.decoding.scoring import NO_ID
from seq2seq.model.decoder_state import State
from seq2seq.model.interface import Decoded
from tests.reference.search import Model, Numbers, Prefix

BEGIN, END = 2, 3
BANNED = (0, 1, 2)
ROWS, PRIME, FACTOR, STRIDE = 499, 2**31 - 1, 1103515245, 7919
LAYERS, HEADS = 2, 3


def hashed(ids: Sequence[int]) -> int:
    code = 0
    for id_ in ids:
        code = (code * FACTOR + id_ + 1) % PRIME
    return code


@dataclass(frozen=True)
class TableState(State):
    sentence_B: Tensor
    source_B: Tensor
    width: int  # of the padded source, as that of keys in an attention
    code_R: Tensor

    def select(self, rows_R: Tensor, beam: int) -> TableState:
        kept_B = self.sentences(rows_R, beam)
        sentence_B, source_B = self.sentence_B[kept_B], self.source_B[kept_B]
        return replace(self.reorder(rows_R), sentence_B=sentence_B, source_B=source_B, beam=beam)

    def reorder(self, rows_R: Tensor) -> TableState:
        return replace(self, code_R=self.code_R[rows_R])

    def join(self, other: TableState) -> TableState:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("sentence_B", "source_B", "code_R"))
        sentence_B, source_B, code_R = map(torch.cat, pairs)
        return replace(
            self, sentence_B=sentence_B, source_B=source_B, width=max(self.width, other.width), code_R=code_R
        )


@dataclass(frozen=True)
class RowsState(State):
    """A number for each row: for step functions that need no model."""

    x_R: Tensor

    def select(self, rows_R: Tensor, beam: int) -> RowsState:
        return RowsState(self.x_R[rows_R], length=self.length, beam=beam)

    def reorder(self, rows_R: Tensor) -> RowsState:
        return self.select(rows_R, self.beam)

    def join(self, other: RowsState) -> RowsState:
        return replace(self, x_R=torch.cat((self.x_R, other.x_R)))


class Table:
    """A model of sentences that are numbers; `end` is about the log odds of END, `width` the longest source."""

    size = 0  # parameters

    def __init__(
        self, seed: int, vocabulary: int, width: int, end: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        random = np.random.default_rng(seed)
        logits = 2.0 * random.standard_normal((ROWS, vocabulary)) + random.normal(0, 20, (ROWS, 1))
        logits[:, END] += end + np.log(vocabulary)
        weights = random.random((ROWS, LAYERS, HEADS, width)) ** 4 + 1e-4
        self._logits_XV, self._weights_XLNS = (torch.from_numpy(x).to(dtype) for x in (logits, weights))
        self.logits_XV, self.weights_XLNS = self._logits_XV.double().numpy(), self._weights_XLNS.double().numpy()
        self.calls: list[list[int]] = []  # the sentences of each step
        self.reads: list[list[list[int]]] = []  # the sentences of each call of `start`

    # -------------------------------------------------------------------------------------------- for the reference

    def row(self, sentence: int, prefix: Prefix) -> int:
        return (hashed((BEGIN, *prefix)) + STRIDE * sentence) % ROWS

    def weights_LNS(self, sentence: int, source: int, prefix: Prefix) -> Numbers:
        got = self.weights_XLNS[self.row(sentence, prefix), :, :, :source]
        return got / got.sum(2, keepdims=True)

    def model(self, sentence: int, source: int) -> Model:
        """The model of a sentence with so many source positions."""

        @cache
        def logits(prefix: Prefix) -> Numbers:
            return self.logits_XV[self.row(sentence, prefix)]

        return Model(logits, lambda prefix: self.weights_LNS(sentence, source, prefix).mean((0, 1)))

    # ------------------------------------------------------------------------------------------------ for the search

    def begin(self, sentences: Sequence[int], sources: Sequence[int]) -> TableState:
        zero_R = torch.zeros(len(sentences), dtype=torch.int64)
        return TableState(torch.tensor(list(sentences)), torch.tensor(list(sources)), max(sources), zero_R)

    def step(self, target_RT: Tensor, state: State, shortlist_BU: Tensor | None = None) -> tuple[Tensor, State]:
        assert shortlist_BU is None
        features_RTD, after, _ = self.decode(target_RT, state)
        return self.logits(features_RTD), after

    def step_with_attention(self, target_RT: Tensor, state: State) -> tuple[Tensor, State, Tensor]:
        """A step that gives the mean of its attention as well."""
        features_RTD, after, weights = self.decode(target_RT, state, weights=True)
        return self.logits(features_RTD), after, torch.stack(weights, 1)[:, :, :, -1].mean((1, 2))

    def decode(self, target_RT: Tensor, state: State, weights: bool = False) -> Decoded:
        """Features are numbers of rows of the tables."""
        assert isinstance(state, TableState)
        self.calls.append(state.sentence_B.tolist())
        sentence_R = state.sentence_B.repeat_interleave(state.beam)
        code_R, rows = state.code_R, []
        for token_R in target_RT.T:
            code_R = (code_R * FACTOR + token_R + 1) % PRIME
            rows.append((code_R + STRIDE * sentence_R) % ROWS)
        row_RT = torch.stack(rows, 1)
        weights_RTLNS = self._weights_XLNS[row_RT][..., : state.width]
        real_RS = torch.arange(weights_RTLNS.shape[-1]) < state.source_B.repeat_interleave(state.beam)[:, None]
        weights_RTLNS = weights_RTLNS * real_RS[:, None, None, None]
        weights_RTLNS = weights_RTLNS / weights_RTLNS.sum(-1, keepdim=True)
        of_layers = tuple(weights_RTLNS.permute(2, 0, 3, 1, 4)) if weights else ()
        return Decoded(row_RT, replace(state, code_R=code_R, length=state.length + target_RT.shape[1]), of_layers)

    def logits(self, features_RTD: Tensor, shortlist_BU: Tensor | None = None) -> Tensor:
        return self._logits_XV[features_RTD]

    # --------------------------------------------------------------------------------- for a translator: real sentences

    def start(self, source_BS: Tensor, mask_BS: Tensor) -> TableState:
        """A sentence's number is a hash of its ids."""
        ids = [row[mask].tolist() for row, mask in zip(source_BS, mask_BS, strict=True)]
        self.reads.append(ids)
        return self.begin([hashed(one) % PRIME for one in ids], [len(one) for one in ids])


def padded_prefixes(prefixes: Sequence[Sequence[int]]) -> Tensor | None:
    """The column of a search task, None where no sentence has a prefix."""
    if not any(prefixes):
        return None
    rows = [torch.tensor(list(prefix), dtype=torch.int64) for prefix in prefixes]
    return pad_sequence(rows, batch_first=True, padding_value=NO_ID)


def mean_of(models: Sequence[Model]) -> Model:
    """An ensemble: the mean of the probabilities, and the attention of the first."""

    @cache
    def logits(prefix: Prefix) -> Numbers:
        return np.log(np.mean([np.exp(model.log_probabilities(prefix)) for model in models], axis=0))

    return Model(logits, models[0].attention)
