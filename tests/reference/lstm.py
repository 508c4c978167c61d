"""The encoder and decoder of Bahdanau et al. 2015 with LSTMs, for one sentence pair without padding, in float64.

Shapes: S source and T target positions, D width, E embedding width, N heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import Weights, attend, below, linear, with_positions
from tests.reference.dropout import OFF, Sites


def cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh c' (Hochreiter & Schmidhuber 1997; Gers et al. 2000)."""
    i, f, g, o = gates.chunk(4)
    c = c / (1 + torch.exp(-f)) + torch.tanh(g) / (1 + torch.exp(-i))
    return torch.tanh(c) / (1 + torch.exp(-o)), c


def lstm(weights: Weights, x_TD: Tensor, h: Tensor | None = None) -> Tensor:
    """One direction over one sentence, from a first hidden state and an empty cell."""
    c = torch.zeros_like(weights["weight_hh_l0"][0])
    h, states = c if h is None else h, []
    for x in x_TD:
        gates = weights["weight_ih_l0"] @ x + weights["weight_hh_l0"] @ h
        h, c = cell(gates + weights["bias_ih_l0"] + weights["bias_hh_l0"], c)
        states.append(h)
    return torch.stack(states)


def convolved(weights: Weights, x_SE: Tensor) -> Tensor:
    """x + relu(conv(x)), with zeros beyond both ends."""
    kernel_OIK, out = weights["weight"], []
    for s in range(len(x_SE)):
        y = weights["bias"]
        for k in range(kernel_OIK.shape[2]):
            neighbour = s + k - kernel_OIK.shape[2] // 2
            if 0 <= neighbour < len(x_SE):
                y = y + kernel_OIK[:, :, k] @ x_SE[neighbour]
        out.append(x_SE[s] + y.clamp(min=0))
    return torch.stack(out)


def embedded(weights: Weights, config: Any, side: str, ids: list[int], sites: Sites, word_dropout: float) -> Tensor:
    part = "encoder" if side == "source" else "decoder"
    x_TE = sites.words(weights[f"{side}_embedding.weight"][torch.tensor(ids)], word_dropout)
    table = weights.get(f"{part}.position.table.weight")
    return with_positions(x_TE * math.sqrt(config.embedding), config.position, table)


def embedding_rate(config: Any) -> float:
    return float(config.dropout if config.embedding_dropout is None else config.embedding_dropout)


def encode(weights: Weights, config: Any, source: list[int], sites: Sites = OFF, word_dropout: float = 0.0) -> Tensor:
    """Annotations [→h; ←h] of each word (§3.2)."""
    x_SD = embedded(weights, config, "source", source, sites, word_dropout)
    for i in range(config.convolutions):
        x_SD = convolved(below(weights, f"encoder.convolutions.layers.{i}"), x_SD)
    for i in range(config.encoder_layers):
        x_SD = sites.numbers(x_SD, config.dropout if i else embedding_rate(config))
        w = below(weights, f"encoder.layers.{i}")
        forwards_SD = lstm(below(w, "forwards"), x_SD)
        backwards_SD = lstm(below(w, "backwards"), x_SD.flip(0)).flip(0)
        x_SD = torch.cat((forwards_SD, backwards_SD), -1)
    return sites.numbers(x_SD, config.dropout)


def first_state(weights: Weights, config: Any, memory_SD: Tensor) -> Tensor:
    """tanh(W ←h_1) (§A.2.2), or the same of a learned query's attention over all annotations."""
    if config.decoder_init == "backward":
        summary = memory_SD[0, config.width :]
    else:
        pool = below(weights, "decoder.pool.attention")
        query_1D = weights["decoder.pool.query"]
        summary = attend(pool, config.attention.score, 1, "none", query_1D, memory_SD)[0][0]
    return torch.tanh(linear(below(weights, "decoder"), "bridge", summary))


def decode(
    weights: Weights, config: Any, memory_SD: Tensor, target: list[int], sites: Sites = OFF, word_dropout: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Features of each target token, and the N × T × S weights of its one attention."""
    w, a, p = below(weights, "decoder"), config.attention, config.dropout
    y_TE = embedded(weights, config, "target", target, sites, word_dropout)
    y_TE = sites.numbers(y_TE, embedding_rate(config))
    first = first_state(weights, config, memory_SD)
    h, c = first, torch.zeros_like(first)
    hidden, contexts, attention_weights = [], [], []
    for t, y in enumerate(y_TE):
        # c_t from s_{t−1}, then s_t from y_{t−1}, s_{t−1} and c_t (§3.1, §A.1.1).
        attention, drop = below(w, "attention"), sites.numbers
        context_1D, weights_N1S = attend(
            attention,
            a.score,
            a.heads,
            config.position,
            h[None],
            memory_SD,
            query_positions=[t],
            drop=drop,
            p=a.dropout,
        )
        gates = linear(w, "embedded_gates", y) + linear(w, "fed_back_gates", torch.cat((context_1D[0], h)))
        h, c = cell(gates, c)
        hidden.append(h)
        contexts.append(context_1D[0])
        attention_weights.append(weights_N1S)
    x_TD, context_TD = torch.stack(hidden), torch.stack(contexts)
    for i in range(config.decoder_layers - 1):
        fed_TD = torch.cat((sites.numbers(x_TD, p), context_TD), -1)
        x_TD = x_TD + sites.sentences(lstm(below(w, f"above.{i}"), fed_TD, first), config.layer_dropout)
    t_T2E = linear(w, "readout", torch.cat((x_TD, context_TD, y_TE), -1))
    features_TE = torch.maximum(t_T2E[:, 0::2], t_T2E[:, 1::2])  # maxout (§A.2.2)
    return sites.numbers(features_TE, p), [torch.cat(attention_weights, 1)]
