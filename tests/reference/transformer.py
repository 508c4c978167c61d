"""The Transformer of Vaswani et al. 2017, with its variants, for one sentence pair without padding, in float64.

Shapes: S source and T target positions, D width, N heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.reference.attention import Weights, attend, below, linear, with_positions
from tests.reference.dropout import OFF, Sites


def norm(weights: Weights, kind: str, x_TD: Tensor) -> Tensor:
    """Layer normalisation (Ba et al. 2016, eq. 4) or RMSNorm (Zhang & Sennrich 2019, eq. 4)."""
    if kind == "rms":
        return x_TD / torch.sqrt((x_TD**2).mean(-1, keepdim=True) + 1e-5) * weights["weight"]
    centred_TD = x_TD - x_TD.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred_TD**2).mean(-1, keepdim=True) + 1e-5)
    return centred_TD / deviation * weights["weight"] + weights["bias"]


def feed_forward(weights: Weights, config: Any, x_TD: Tensor, sites: Sites) -> Tensor:
    """Vaswani §3.3 with relu; gelu of Hendrycks & Gimpel 2016; SwiGLU of Shazeer 2020, eq. 6, gated by the 2nd half."""
    hidden = linear(weights, "inner", x_TD)
    if config.activation == "relu":
        hidden = hidden.clamp(min=0)
    elif config.activation == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    else:
        hidden, gate = hidden[..., : config.feed_forward], hidden[..., config.feed_forward :]
        hidden = hidden * gate / (1 + torch.exp(-gate))
    p = config.dropout if config.activation_dropout is None else config.activation_dropout
    return linear(weights, "outer", sites.numbers(hidden, p))


def sublayer(weights: Weights, config: Any, x_TD: Tensor, apply: Any, sites: Sites) -> Tensor:
    """x + layer(norm(x)), or norm(x + layer(x)) (§3.1 and §5.4)."""
    pre = config.norm_position == "pre"
    weights = below(weights, "norm")
    change = apply(norm(weights, config.norm, x_TD) if pre else x_TD)
    x_TD = x_TD + sites.sentences(sites.numbers(change, config.dropout), config.layer_dropout)
    return x_TD if pre else norm(weights, config.norm, x_TD)


def embedded(weights: Weights, config: Any, side: str, ids: list[int], sites: Sites, word_dropout: float) -> Tensor:
    """Embeddings times √D (§3.4) plus positions (§3.5)."""
    part = "encoder" if side == "source" else "decoder"
    x_TD = sites.words(weights[f"{side}_embedding.weight"][torch.tensor(ids)], word_dropout) * math.sqrt(config.width)
    x_TD = with_positions(x_TD, config.position, weights.get(f"{part}.input.position.table.weight"))
    return sites.numbers(x_TD, config.dropout if config.embedding_dropout is None else config.embedding_dropout)


def encode(weights: Weights, config: Any, source: list[int], sites: Sites = OFF, word_dropout: float = 0.0) -> Tensor:
    x_SD = embedded(weights, config, "source", source, sites, word_dropout)
    a = config.attention
    for i in range(config.encoder_layers):
        w = below(weights, f"encoder.layers.{i}")

        def attend_own(y: Tensor, w: Weights = w) -> Tensor:
            own = below(w, "attention")
            return attend(own, a.score, a.heads, config.position, y, y, drop=sites.numbers, p=a.dropout)[0]

        def feed(y: Tensor, w: Weights = w) -> Tensor:
            return feed_forward(below(w, "feed_forward"), config, y, sites)

        x_SD = sublayer(below(w, "attention_residual"), config, x_SD, attend_own, sites)
        x_SD = sublayer(below(w, "feed_forward_residual"), config, x_SD, feed, sites)
    return norm(below(weights, "encoder.norm"), config.norm, x_SD) if config.norm_position == "pre" else x_SD


def decode(
    weights: Weights, config: Any, memory_SD: Tensor, target: list[int], sites: Sites = OFF, word_dropout: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """Features of each target token, and each layer's N × T × S weights over the source."""
    x_TD = embedded(weights, config, "target", target, sites, word_dropout)
    past = [[s <= t for s in range(len(target))] for t in range(len(target))]
    a, attention_LNTS = config.attention, []
    for i in range(config.decoder_layers):
        w = below(weights, f"decoder.layers.{i}")

        def attend_back(y: Tensor, w: Weights = w) -> Tensor:
            own, drop = below(w, "self_attention"), sites.numbers
            return attend(own, a.score, a.heads, config.position, y, y, visible=past, drop=drop, p=a.dropout)[0]

        def attend_across(y: Tensor, w: Weights = w) -> Tensor:
            own, drop = below(w, "cross_attention"), sites.numbers
            context_TD, weights_NTS = attend(own, a.score, a.heads, "none", y, memory_SD, drop=drop, p=a.dropout)
            attention_LNTS.append(weights_NTS)
            return context_TD

        def feed(y: Tensor, w: Weights = w) -> Tensor:
            return feed_forward(below(w, "feed_forward"), config, y, sites)

        x_TD = sublayer(below(w, "self_residual"), config, x_TD, attend_back, sites)
        x_TD = sublayer(below(w, "cross_residual"), config, x_TD, attend_across, sites)
        x_TD = sublayer(below(w, "feed_forward_residual"), config, x_TD, feed, sites)
    if config.norm_position == "pre":
        x_TD = norm(below(weights, "decoder.norm"), config.norm, x_TD)
    return x_TD, attention_LNTS
