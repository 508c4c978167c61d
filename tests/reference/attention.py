"""Attention and positions as the papers write them: one head, one query and one key at a time, in float64.

Shapes: S keys, T queries, N heads, H head width, D width.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.reference.dropout import OFF, Drop

Weights = Mapping[str, Tensor]


def below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The parameters of one part, by their names inside it."""
    return {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name.startswith(f"{prefix}.")}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def with_positions(x_TD: Tensor, kind: str, table: Tensor | None = None, start: int = 0) -> Tensor:
    """Embeddings plus sinusoids (Vaswani et al. 2017, §3.5) or rows of a learned table, whose last row repeats."""
    rows = []
    for t, x_D in enumerate(x_TD):
        position, width = start + t, len(x_D)
        if kind == "sinusoidal":
            angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
            x_D = x_D + torch.tensor([f(a) for a in angles for f in (math.sin, math.cos)], dtype=x_D.dtype)
        elif kind == "learned":
            assert table is not None
            x_D = x_D + table[min(position, len(table) - 1)]
        rows.append(x_D)
    return torch.stack(rows)


def rotated(x_H: Tensor, position: int) -> Tensor:
    """Each pair as a complex number times e^(i·m·θ), θ = 10,000^(−2j/H) (Su et al. 2021, §3.2.2)."""
    turn = [cmath.exp(1j * position * 10_000 ** (-2 * j / len(x_H))) for j in range(len(x_H) // 2)]
    turned = torch.view_as_complex(x_H.reshape(-1, 2)) * torch.tensor(turn, dtype=torch.complex128)
    return torch.view_as_real(turned).flatten()


def slope(head: int, heads: int) -> float:
    """Press et al. 2022, §3: for n heads a geometric sequence that starts at 2^(−8/n), with that same ratio."""
    return math.prod([2 ** (-8 / heads)] * (head + 1))


def energy(weights: Weights, score: str, head: int, q_H: Tensor, k_H: Tensor) -> Tensor:
    """The score of one query and one key under one head."""
    if score == "additive":
        return weights["v_NH"][head] @ torch.tanh(q_H + k_H)
    if score == "dot":
        return q_H @ k_H
    if score == "scaled_dot":
        return q_H @ k_H / math.sqrt(len(q_H))
    if score == "general":
        return q_H @ k_H  # the matrix between them belongs to the query: it stands before any rotation
    assert score == "cosine"
    return weights["gain_N"][head].exp() * (q_H @ k_H) / (q_H.norm() * k_H.norm())


def attend(
    weights: Weights,
    score: str,
    heads: int,
    position: str,
    query_TD: Tensor,
    memory_SD: Tensor,
    *,
    visible: Sequence[Sequence[bool]] | None = None,
    query_positions: Sequence[int] | None = None,
    key_positions: Sequence[int] | None = None,
    drop: Drop = OFF.numbers,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Contexts and N × T × S weights before dropout; `visible` says which keys each query may see."""
    T, S = len(query_TD), len(memory_SD)
    query_positions, key_positions = query_positions or range(T), key_positions or range(S)
    q_TD, k_SD = linear(weights, "query", query_TD), linear(weights, "key", memory_SD)
    v_SD = linear(weights, "value", memory_SD) if "value.weight" in weights else memory_SD
    contexts, all_weights = [], []
    for n, (q_TH, k_SH, v_SH) in enumerate(zip(*(x.chunk(heads, -1) for x in (q_TD, k_SD, v_SD)), strict=True)):
        rows = []
        for t in range(T):
            scores = []
            for s in range(S):
                q_H, k_H = q_TH[t], k_SH[s]
                if score == "general":
                    q_H = weights["general_NHH"][n].T @ q_H  # q·W k (Luong et al. 2015, §3.1)
                if position == "rotary":
                    q_H, k_H = rotated(q_H, query_positions[t]), rotated(k_H, key_positions[s])
                e = energy(weights, score, n, q_H, k_H)
                if position == "alibi":
                    e = e - slope(n, heads) * abs(query_positions[t] - key_positions[s])
                scores.append(e if visible is None or visible[t][s] else torch.full_like(e, -math.inf))
            exp_S = torch.exp(torch.stack(scores))
            rows.append(exp_S / exp_S.sum())
        all_weights.append(torch.stack(rows))
        contexts.append(drop(torch.stack(rows), p) @ v_SH)
    context_TD = torch.cat(contexts, -1)
    if "output.weight" in weights:
        context_TD = linear(weights, "output", context_TD)
    return context_TD, torch.stack(all_weights)
