"""Attention and positional encodings, shared by the LSTM and the Transformer.

Shapes: B sentences, R rows (B × beam), S source (or cached) and T target (or query) positions, D width,
N heads, H head width. Masks are True for real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seq2seq.model.decoder_state import bucket
from seq2seq.model.layers import dropout, initialise
from seq2seq.model.layout import PADDED, Layout, Packed
from seq2seq.model.packed_attention import HEAD_MULTIPLE, attend_packed

Start = int | Tensor  # a position; on the device in a step that a graph replays
LEAST_SOURCE = 16  # source positions of a fixed state


class KeyValue(NamedTuple):
    """Keys and values of a memory, projected once for all queries."""

    key_RNSH: Tensor
    value_RNSH: Tensor
    bias_R1QS: Tensor | None  # −∞ where masked, for all queries (Q = 1) or for each; None: no mask
    packed: Packed | None = None  # the layout of all sentences in one row; None: padded

    def select(self, rows_R: Tensor) -> KeyValue:
        key_RNSH, value_RNSH = (x.index_select(0, rows_R) for x in (self.key_RNSH, self.value_RNSH))
        bias = None if self.bias_R1QS is None else aligned(self.bias_R1QS.index_select(0, rows_R))
        return KeyValue(key_RNSH, value_RNSH, bias)

    def join(self, other: KeyValue) -> KeyValue:
        """Concatenate the rows of both; the bias masks the padding of the shorter one."""
        key = concatenate_padded(as_stored(self.key_RNSH), as_stored(other.key_RNSH))
        value_RNSH = concatenate_padded(self.value_RNSH, other.value_RNSH)
        bias = None
        if self.bias_R1QS is not None and other.bias_R1QS is not None:
            bias = aligned(concatenate_padded(self.bias_R1QS, other.bias_R1QS, -math.inf))
        return KeyValue(as_stored(key), value_RNSH, bias)

    def fixed(self, sentences: int) -> KeyValue:
        """Pad to more sentences and positions, which the bias masks, except in rows that are padding altogether."""
        B, N, S, _ = self.key_RNSH.shape
        room = bucket(S, LEAST_SOURCE)
        key_RNSH, value_RNSH = (enlarged(x, (sentences, N, room, x.shape[3])) for x in (self.key_RNSH, self.value_RNSH))
        bias = self.bias_R1QS
        if bias is not None:
            bias = enlarged(enlarged(bias, (B, 1, 1, room), -math.inf), (sentences, 1, 1, room))
        return KeyValue(key_RNSH, value_RNSH, bias)


def enlarged(x: Tensor, shape: Sequence[int], value: float = 0.0) -> Tensor:
    """Return a tensor of a larger shape with x in its first corner, and a number elsewhere."""
    missing = [want - have for have, want in zip(reversed(x.shape), reversed(shape), strict=True)]
    return F.pad(x, [n for amount in missing for n in (0, amount)], value=value)


def concatenate_padded(a: Tensor, b: Tensor, value: float = 0.0) -> Tensor:
    """Concatenate along the first dimension, after padding the other dimensions to equal size."""

    def padded(x: Tensor, like: Tensor) -> Tensor:
        shape = (len(x), *map(max, x.shape[1:], like.shape[1:]))
        return x if x.shape == shape else enlarged(x, shape, value)

    return torch.cat((padded(a, b), padded(b, a)))


class AttentionOutput(NamedTuple):
    context_RTD: Tensor
    weights_RNTS: Tensor | None  # on request


class Attention(nn.Module):
    """Score queries against keys and average the values by the softmax (Bahdanau §3.1, Vaswani §3.2).

    Scores of a query q and a key k, per head: additive v·tanh(q + k) (Bahdanau §A.1.2), dot q·k, scaled_dot
    q·k/√H (Vaswani §3.2.1), general q·W k (Luong §3.1), cosine g·q·k/(|q||k|) with a learned g.
    """

    def __init__(
        self,
        query_width: int,
        memory_width: int,
        width: int,
        heads: int,
        score: str,
        position_kind: str = "none",
        p: float = 0.0,
        project_values: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.score, self.position_kind, self.p = heads, score, position_kind, p
        head = width // heads
        self.query = nn.Linear(query_width, width, bias=False)
        self.key = nn.Linear(memory_width, width, bias=score == "additive")
        # Without a projection the values are the memory itself, as in Bahdanau and Luong.
        self.value = nn.Linear(memory_width, width) if project_values else None
        self.output = nn.Linear(width, query_width) if project_values else None
        self.context_width = query_width if project_values else memory_width
        if score == "additive":
            self.v_NH = nn.Parameter(torch.empty(heads, head))
        elif score == "general":
            self.general_NHH = nn.Parameter(torch.empty(heads, head, head))
        elif score == "cosine":
            self.gain_N = nn.Parameter(torch.full((heads,), math.log(10.0)))
        initialise(self)
        if score == "general":
            # Each head starts as the plain dot product.
            nn.init.zeros_(self.general_NHH).data.diagonal(dim1=1, dim2=2).fill_(1.0)

    def project(
        self, memory_RSD: Tensor, mask_RS: Tensor | None = None, layout: Layout = PADDED, *, start: Start = 0
    ) -> KeyValue:
        """Project a memory whose first position is `start` to keys and values."""
        if self.stays_packed(layout):
            value_MD = self.value(memory_RSD) if self.value else memory_RSD
            key_1NMH, value_1NMH = (self._split(x_MD[None]) for x_MD in (self.key(memory_RSD), value_MD))
            return KeyValue(self._key(key_1NMH, layout), value_1NMH, None, layout)
        key_RSD = layout.unpack(self.key(memory_RSD))
        value_RSD = layout.unpack(self.value(memory_RSD) if self.value else memory_RSD)
        key_RNSH, value_RNSH = self._key(self._split(key_RSD), start), self._split(value_RSD)
        bias_R11S = None
        if mask_RS is not None:
            bias_R11S = aligned(memory_RSD.new_zeros(mask_RS.shape).masked_fill(~mask_RS, -math.inf)[:, None, None])
        return KeyValue(key_RNSH, value_RNSH, bias_R11S)

    def forward(
        self,
        query_RTD: Tensor,
        kv: KeyValue,
        *,
        start: Start = 0,
        causal: bool = False,
        weights: bool = False,
        position_S: Tensor | None = None,
        layout: Layout = PADDED,
    ) -> AttentionOutput:
        """Attend from queries whose first position is `start`; several rows may share one sentence's keys.

        `position_S` holds each key's position (None: 0, 1, 2, …). Queries and contexts have the given layout.
        """
        if kv.packed is not None and isinstance(layout, Packed):
            return self._forward_packed(query_RTD, kv, kv.packed, layout, causal)
        query_RTD = layout.unpack(self.query(query_RTD))
        R, T, _ = query_RTD.shape
        B, _, S, _ = kv.key_RNSH.shape
        fused = self.score != "additive" and not weights and use_fused_kernel(query_RTD)
        # Where nothing but the future is masked, the kernel needs no mask and skips what it hides.
        unmasked = kv.bias_R1QS is None and self.position_kind != "alibi"
        is_causal = fused and causal and unmasked and R == B and T == S and isinstance(start, int) and start == 0
        query_RNTH = self._query(self._split(query_RTD), start)
        bias = self._bias(causal and not is_causal, T, S, start, query_RTD, position_S)
        if R != B:
            # The rows of a sentence become extra queries, so its keys are never copied.
            query_RNTH = query_RNTH.unflatten(0, (B, R // B)).transpose(1, 2).flatten(2, 3)
            bias = None if bias is None else bias.repeat(1, 1, R // B if T > 1 else 1, 1)
        if kv.bias_R1QS is not None:
            bias = kv.bias_R1QS if bias is None else kv.bias_R1QS + bias
        context, attention_weights = self._attend(query_RNTH, kv, bias, fused, is_causal, weights)
        if R != B:
            context = _to_rows(context, T)
            attention_weights = None if attention_weights is None else _to_rows(attention_weights, T)
        context_RTD = layout.pack(context.transpose(1, 2).flatten(2))
        return AttentionOutput(self.output(context_RTD) if self.output else context_RTD, attention_weights)

    def stays_packed(self, layout: Layout) -> TypeGuard[Packed]:
        """Whether sentences attend as they are packed: products as scores, and nothing else for each pair of tokens."""
        if layout.bounds is None or self.score == "additive" or self.position_kind == "alibi":
            return False
        # The kernel's backward pass would drop other weights than its forward pass did.
        dropped = self.training and self.p > 0
        return not dropped and self.query.out_features // self.heads % HEAD_MULTIPLE == 0

    def _forward_packed(
        self, query_MD: Tensor, kv: KeyValue, keys: Packed, queries: Packed, causal: bool
    ) -> AttentionOutput:
        query_1NMH = self._query(self._split(self.query(query_MD)[None]), queries)
        context_1NMH = attend_packed(query_1NMH, kv.key_RNSH, kv.value_RNSH, queries, keys, causal)
        context_MD = context_1NMH.transpose(1, 2).flatten(2)[0]
        return AttentionOutput(self.output(context_MD) if self.output else context_MD, None)

    def _attend(
        self, query_RNTH: Tensor, kv: KeyValue, bias: Tensor | None, fused: bool, is_causal: bool, weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Average the values, by torch's fused kernel or in plain form; return the weights too if requested."""
        p = self.p if self.training else 0.0
        if fused:
            context_RNTH = F.scaled_dot_product_attention(
                query_RNTH, kv.key_RNSH, kv.value_RNSH, bias, p, is_causal, scale=1.0
            )
            return context_RNTH, None
        weights_RNTS = self._weights(query_RNTH, kv.key_RNSH, bias)
        context_RNTH = dropout(weights_RNTS, p, p > 0) @ kv.value_RNSH
        return context_RNTH, weights_RNTS if weights else None

    def _split(self, x_RTD: Tensor) -> Tensor:
        return x_RTD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _key(self, key_RNSH: Tensor, start: Start | Packed) -> Tensor:
        if self.score == "cosine":
            key_RNSH = unit(key_RNSH)
        return rotate(key_RNSH, start) if self.position_kind == "rotary" else key_RNSH

    def _query(self, query_RNTH: Tensor, start: Start | Packed) -> Tensor:
        query_RNTH = self.scored_query(query_RNTH)
        return rotate(query_RNTH, start) if self.position_kind == "rotary" else query_RNTH

    def scored_query(self, query_RNTH: Tensor) -> Tensor:
        """Transform queries so that every score but the additive one is their dot product with the keys."""
        if self.score == "scaled_dot":
            return query_RNTH * query_RNTH.shape[-1] ** -0.5
        if self.score == "general":
            return query_RNTH @ self.general_NHH
        if self.score == "cosine":
            return unit(query_RNTH) * self.gain_N.exp()[:, None, None]
        return query_RNTH

    def _bias(
        self, causal: bool, T: int, S: int, start: Start, like: Tensor, position_S: Tensor | None
    ) -> Tensor | None:
        """Return the positional term of the scores: −∞ for the future, plus ALiBi's penalty; None if all zero."""
        bias = alibi(self.heads, T, S, start, like, position_S) if self.position_kind == "alibi" else None
        if causal and start + 1 < S:
            assert isinstance(start, int)  # a fixed cache masks the future itself
            future_TS = torch.ones(T, S, dtype=torch.bool, device=like.device).triu(1 + start)
            bias = (0 if bias is None else bias) + like.new_zeros(1, 1, T, S).masked_fill(future_TS, -math.inf)
        return bias

    def _weights(self, query_RNTH: Tensor, key_RNSH: Tensor, bias: Tensor | None) -> Tensor:
        if self.score == "additive":
            pairs_RNTSH = query_RNTH.unsqueeze(3) + key_RNSH.unsqueeze(2)
            scores_RNTS = (pairs_RNTSH.tanh() @ self.v_NH[:, None, :, None]).squeeze(-1)
        else:
            scores_RNTS = query_RNTH @ key_RNSH.transpose(2, 3)
        if bias is not None:
            scores_RNTS = scores_RNTS + bias
        return scores_RNTS.softmax(-1)


def use_fused_kernel(x: Tensor) -> bool:
    """Return whether torch's fused kernel is faster; on a CPU the plain form wins for many short sentences."""
    return x.is_cuda


def as_stored(key: Tensor) -> Tensor:
    """View keys [.., slots, head width] as they lie in memory, or stored keys as keys: it is its own inverse.

    The fused kernels need the head width last; on a CPU the plain product is three times as fast with slots last.
    """
    return key if use_fused_kernel(key) else key.mT


def aligned(bias: Tensor) -> Tensor:
    """Let the rows of a bias start at multiples of 8, as the fused kernels require: else each call copies it."""
    S = bias.shape[-1]
    return F.pad(bias, (0, -S % 8))[..., :S] if use_fused_kernel(bias) and S % 8 else bias


class Position(nn.Module):
    """Add positions to embeddings: sinusoidal (Vaswani §3.5) or learned; other kinds add nothing."""

    def __init__(self, kind: str, width: int, max_length: int) -> None:
        super().__init__()
        self.kind = kind
        self.table = nn.Embedding(max_length, width) if kind == "learned" else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=width**-0.5)

    def forward(self, x_RTD: Tensor, start: Start = 0) -> Tensor:
        position_T = positions(start, x_RTD.shape[1], x_RTD.device)
        if self.table is not None:
            # Positions beyond the table share its last row.
            return x_RTD + self.table(position_T.clamp(max=self.table.num_embeddings - 1))
        if self.kind == "sinusoidal":
            angle = _angles(position_T, x_RTD.shape[-1])
            return x_RTD + torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(x_RTD.dtype)
        return x_RTD


def _to_rows(x_BNQH: Tensor, T: int) -> Tensor:
    """Split the queries of each sentence back into rows."""
    return x_BNQH.unflatten(2, (-1, T)).transpose(1, 2).flatten(0, 1)


def unit(x: Tensor) -> Tensor:
    """Divide vectors by their lengths; a zero vector stays zero, in float16 too."""
    return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)


def positions(start: Start, count: int, device: torch.device) -> Tensor:
    """Return `count` positions from `start` on."""
    if isinstance(start, Tensor):
        return start + torch.arange(count, device=device)
    return torch.arange(start, start + count, device=device)


def rotate(x_RNTH: Tensor, start: Start | Packed) -> Tensor:
    """Rotate pairs of channels by an angle that grows with the position (Su et al. 2021, §3.2)."""
    length, device = x_RNTH.shape[2], x_RNTH.device
    position_T = start.position_M if isinstance(start, Packed) else positions(start, length, device)
    angle = _angles(position_T, x_RNTH.shape[-1])
    sin, cos = angle.sin().to(x_RNTH.dtype), angle.cos().to(x_RNTH.dtype)
    even, odd = x_RNTH[..., 0::2], x_RNTH[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def alibi(heads: int, T: int, S: int, start: Start, like: Tensor, position_S: Tensor | None = None) -> Tensor:
    """Return a distance penalty with one slope per head (Press et al. 2022, §3), here in both directions."""
    slope_N = 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=like.device) / heads)
    query_T = positions(start, T, like.device)
    distance_TS = (query_T[:, None] - (torch.arange(S, device=like.device) if position_S is None else position_S)).abs()
    return (-slope_N[:, None, None] * distance_TS)[None].to(like.dtype)


def _angles(position_T: Tensor, width: int) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=position_T.device) / width)
    return position_T[:, None] * frequency
