"""The attentional LSTM encoder and decoder (Bahdanau et al. 2015).

Shapes: B sentences, R rows (B × beam), S source and T target positions, D width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seq2seq.config.schema import LSTMConfig
from seq2seq.model.attention import Attention, KeyValue, Position, enlarged
from seq2seq.model.decoder_state import State, on_device
from seq2seq.model.interface import Decoded, Memory
from seq2seq.model.layers import drop_rows, dropout, embedding, initialise, value_or
from seq2seq.model.layout import PADDED, Layout


class LayerState(NamedTuple):
    hidden_RD: Tensor
    cell_RD: Tensor

    def select(self, rows_R: Tensor) -> LayerState:
        return LayerState(self.hidden_RD.index_select(0, rows_R), self.cell_RD.index_select(0, rows_R))

    def fixed(self, rows: int) -> LayerState:
        return LayerState(*(enlarged(x_RD, (rows, x_RD.shape[1])) for x_RD in self))

    def join(self, other: LayerState) -> LayerState:
        return LayerState(*map(torch.cat, zip(self, other, strict=True)))


@dataclass(frozen=True)
class LSTMState(State):
    memory: KeyValue  # per sentence
    layers: tuple[LayerState, ...]  # per hypothesis; the first layer attends

    def select(self, rows_R: Tensor, beam: int) -> LSTMState:
        memory = self.memory.select(self.sentences(rows_R, beam))
        return replace(self.reorder(rows_R), memory=memory, beam=beam)

    def reorder(self, rows_R: Tensor) -> LSTMState:
        return replace(self, layers=tuple(layer.select(rows_R) for layer in self.layers))

    def fixed(self, sentences: int, steps: int) -> LSTMState:
        layers = tuple(layer.fixed(sentences * self.beam) for layer in self.layers)
        length = on_device(self.length, self.memory.key_RNSH)
        return replace(self, memory=self.memory.fixed(sentences), layers=layers, length=length)

    def plain(self, length: int) -> LSTMState:
        return replace(self, length=length)

    def join(self, other: LSTMState) -> LSTMState:
        layers = tuple(a.join(b) for a, b in zip(self.layers, other.layers, strict=True))
        return replace(self, memory=self.memory.join(other.memory), layers=layers)


class Convolutions(nn.Module):
    """Residual convolutions over the source embeddings; padding stays zero, so it has no effect."""

    def __init__(self, width: int, kernel: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in range(count))
        initialise(self)

    def forward(self, x_BSE: Tensor, mask_BS: Tensor) -> Tensor:
        real_BS1 = mask_BS.unsqueeze(-1)
        for layer in self.layers:
            x_BSE = x_BSE * real_BS1
            x_BSE = x_BSE + layer(x_BSE.transpose(1, 2)).transpose(1, 2).relu()
        return x_BSE


class BidirectionalLayer(nn.Module):
    """Two LSTMs, the second from right to left (§3.2), with each sentence reversed within its real length."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.forwards, self.backwards = _lstm(width_in, width), _lstm(width_in, width)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        # Reversing each sentence within its real length keeps padding at the end in both directions.
        position_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        reversed_BS = mask_BS.sum(1, keepdim=True) - 1 - position_S
        reversed_BS1 = torch.where(mask_BS, reversed_BS, position_S).unsqueeze(-1)
        forwards_BSD, _ = self.forwards(x_BSD)
        backwards_BSD, _ = self.backwards(x_BSD.take_along_dim(reversed_BS1, 1))
        return torch.cat((forwards_BSD, backwards_BSD.take_along_dim(reversed_BS1, 1)), -1)


class Encoder(nn.Module):
    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.p, self.embedding_p = config.dropout, value_or(config.embedding_dropout, config.dropout)
        self.position = Position(config.position, config.embedding, config.max_length)
        self.convolutions = Convolutions(config.embedding, config.kernel_size, config.convolutions)
        widths = [config.embedding] + [2 * config.width] * (config.encoder_layers - 1)
        self.layers = nn.ModuleList(BidirectionalLayer(width, config.width) for width in widths)

    def forward(self, source_BSE: Tensor, mask_BS: Tensor, layout: Layout = PADDED) -> Memory:
        x_BSD = self.convolutions(self.position(_unit(source_BSE)), mask_BS)
        for i, layer in enumerate(self.layers):
            x_BSD = layer(dropout(x_BSD, self.p if i else self.embedding_p, self.training), mask_BS)
        return Memory(dropout(x_BSD, self.p, self.training), mask_BS)


class Decoder(nn.Module):
    """s_t = LSTM([y_{t-1}; c_t], s_{t-1}), c_t attended to from s_{t-1} (§3.1); further layers and a maxout readout."""

    uncompiled = ("_attend_and_recur",)  # torch.compile would unroll the loop anew for every target length

    def __init__(self, config: LSTMConfig) -> None:
        super().__init__()
        self.width, self.p, memory_width = config.width, config.dropout, 2 * config.width
        self.embedding_p, self.layer_dropout = value_or(config.embedding_dropout, config.dropout), config.layer_dropout
        a = config.attention
        self.position = Position(config.position, config.embedding, config.max_length)
        # One head attends to the encoder states directly; several need separate projections.
        self.attention = Attention(
            config.width,
            memory_width,
            config.width,
            a.heads,
            a.score,
            config.position,
            a.dropout,
            a.heads > 1,
        )
        context_width = self.attention.context_width
        self.pool = Pooling(config, memory_width) if config.decoder_init == "pooled" else None
        self.bridge = nn.Linear(config.width if self.pool is None else memory_width, config.width)
        self.embedded_gates = nn.Linear(config.embedding, 4 * config.width)
        self.fed_back_gates = nn.Linear(context_width + config.width, 4 * config.width, bias=False)
        self.above = nn.ModuleList(
            _lstm(config.width + context_width, config.width) for _ in range(config.decoder_layers - 1)
        )
        self.readout = nn.Linear(config.width + context_width + config.embedding, 2 * config.embedding)
        for linear in (self.bridge, self.embedded_gates, self.fed_back_gates, self.readout):
            initialise(linear)
        _open_forget_gate(self.embedded_gates.bias)

    def start(self, memory: Memory) -> LSTMState:
        """Compute the first state from the backward encoder at the first word (§A.2.2), or by pooling."""
        summary_BD = memory.states_BSD[:, 0, self.width :] if self.pool is None else self.pool(memory)
        hidden_BD = self.bridge(summary_BD).tanh()
        cell_BD = torch.zeros_like(hidden_BD, dtype=torch.float32)
        above = (LayerState(hidden_BD, torch.zeros_like(hidden_BD)) for _ in self.above)
        return LSTMState(self.attention.project(*memory), (LayerState(hidden_BD, cell_BD), *above))

    def forward(self, target_RTE: Tensor, state: LSTMState, weights: bool = False, layout: Layout = PADDED) -> Decoded:
        target_RTE = dropout(self.position(_unit(target_RTE), state.length), self.embedding_p, self.training)
        hidden_RTD, context_RTD, first, attention_weights = self._attend_and_recur(target_RTE, state, weights)
        x_RTD, layers = hidden_RTD, [first]
        for lstm, (h_RD, c_RD) in zip(self.above, state.layers[1:], strict=True):
            input_RTD = torch.cat((dropout(x_RTD, self.p, self.training), context_RTD), -1)
            out_RTD, (h_1RD, c_1RD) = lstm(input_RTD, (h_RD[None].contiguous(), c_RD[None].contiguous()))
            x_RTD = x_RTD + drop_rows(out_RTD, self.layer_dropout, self.training, words=False)
            layers.append(LayerState(h_1RD[0], c_1RD[0]))
        combined_RTD = torch.cat((x_RTD, context_RTD, target_RTE), -1)
        readout = self.readout(layout.pack(combined_RTD))
        features_RTE = readout.unflatten(-1, (-1, 2)).amax(-1)  # maxout (§A.2.2)
        features_RTE = dropout(features_RTE, self.p, self.training)
        state = replace(state, layers=tuple(layers), length=state.length + target_RTE.shape[1])
        return Decoded(features_RTE, state, attention_weights)

    def _attend_and_recur(
        self, target_RTE: Tensor, state: LSTMState, weights: bool
    ) -> tuple[Tensor, Tensor, LayerState, tuple[Tensor, ...]]:
        """Run the recurrence alone; everything that does not feed back is computed outside."""
        gates_RTD = self.embedded_gates(target_RTE)
        h_RD, c_RD = state.layers[0]
        hidden, contexts, attention_weights = [], [], []
        for t, gates_RD in enumerate(gates_RTD.unbind(1)):
            attended = self.attention(h_RD[:, None], state.memory, start=state.length + t, weights=weights)
            context_RD = attended.context_RTD[:, 0]
            gates_RD = gates_RD + self.fed_back_gates(torch.cat((context_RD, h_RD), -1))
            h_RD, c_RD = lstm_cell(gates_RD, c_RD)
            hidden.append(h_RD)
            contexts.append(context_RD)
            attention_weights.append(attended.weights_RNTS)
        all_weights = (torch.cat(attention_weights, 2),) if weights else ()
        return torch.stack(hidden, 1), torch.stack(contexts, 1), LayerState(h_RD, c_RD), all_weights


class Pooling(nn.Module):
    """Summarise the encoder states by attention from one learned query."""

    def __init__(self, config: LSTMConfig, memory_width: int) -> None:
        super().__init__()
        a = config.attention
        self.query = nn.Parameter(embedding(1, config.width).weight.detach())
        self.attention = Attention(config.width, memory_width, config.width, 1, a.score, project_values=False)

    def forward(self, memory: Memory) -> Tensor:
        query_B1D = self.query.expand(len(memory.mask_BS), 1, -1)
        return self.attention(query_B1D, self.attention.project(*memory)).context_RTD[:, 0]


def lstm_cell(gates_RD: Tensor, c_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Apply input, forget, cell and output gates → hidden state, and cell in float32, as it sums many steps."""
    i, f, g, o = gates_RD.float().chunk(4, -1)
    c_RD = f.sigmoid() * c_RD + i.sigmoid() * g.tanh()
    return (o.sigmoid() * c_RD.tanh()).to(gates_RD.dtype), c_RD


def _unit(embedded_RTE: Tensor) -> Tensor:
    """Scale embedding rows of norm one to entries of size one, which suit a recurrence better."""
    return embedded_RTE * embedded_RTE.shape[-1] ** 0.5


def _lstm(width_in: int, width: int) -> nn.LSTM:
    lstm = nn.LSTM(width_in, width, batch_first=True)
    _initialise_lstm(lstm)
    return lstm


def _initialise_lstm(lstm: nn.LSTM) -> None:
    """Initialise input weights by Xavier, recurrent ones orthogonally, and open the forget gate."""
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        elif name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
        if name.startswith("bias_ih"):
            _open_forget_gate(parameter)


def _open_forget_gate(bias: Tensor) -> None:
    with torch.no_grad():
        bias.chunk(4)[1].fill_(1.0)
