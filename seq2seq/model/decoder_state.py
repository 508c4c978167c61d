"""Decoder state between steps, as a value; all models share `select` and `reorder`.

Shapes: B sentences, K hypotheses of each, R = B × K rows, T new positions, P slots, N heads, H head width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.model.attention import KeyValue

TensorTree = Any  # a Tensor, a KVCache, None, or a (named) tuple of trees
SPARE_STEPS = 6  # additional steps allocated when a cache grows, …
SLOT_MULTIPLE = 16  # … rounded up to this multiple for vector instructions


def map_tensors(function: Callable[[Any], Any], tree: TensorTree) -> TensorTree:
    """Apply a function to each tensor and cache of a tree."""
    if isinstance(tree, (Tensor, KVCache)):
        return function(tree)
    if tree is None:
        return None
    mapped = (map_tensors(function, part) for part in tree)
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


def concatenate_trees(a: TensorTree, b: TensorTree) -> TensorTree:
    """Concatenate the rows of two trees."""
    if isinstance(a, Tensor):
        return torch.cat((a, b))
    if isinstance(a, (KeyValue, KVCache)):
        return a.join(b)
    if a is None:
        return None
    joined = map(concatenate_trees, a, b)
    return type(a)(*joined) if hasattr(a, "_fields") else tuple(joined)


@dataclass(frozen=True)
class State:
    """B sentences with `beam` hypotheses each: `memory` has B rows, `history` B × beam, grouped by sentence."""

    memory: TensorTree  # per sentence: the projected memory
    history: TensorTree  # per hypothesis: past keys and values, or recurrent states
    length: int = 0  # target positions decoded so far
    beam: int = 1

    def select(self, rows_R: Tensor, beam: int) -> State:
        """Return the given rows as a new state with `beam` rows per kept sentence."""
        sentences_B = rows_R[::beam] // self.beam
        memory = map_tensors(lambda x: x.index_select(0, sentences_B), self.memory)

        def rows(x: Tensor | KVCache) -> Tensor | KVCache:
            return x.index_select(0, rows_R) if isinstance(x, Tensor) else x.select(sentences_B, rows_R, beam)

        return replace(self, memory=memory, history=map_tensors(rows, self.history), beam=beam)

    def reorder(self, rows_R: Tensor) -> State:
        """Reorder hypotheses within their sentences; per-sentence tensors stay unchanged."""

        def rows(x: Tensor | KVCache) -> Tensor | KVCache:
            return x.index_select(0, rows_R) if isinstance(x, Tensor) else x.reorder(rows_R)

        return replace(self, history=map_tensors(rows, self.history))

    def join(self, other: State) -> State:
        """Concatenate two states of the same beam and length."""
        memory, history = concatenate_trees(self.memory, other.memory), concatenate_trees(self.history, other.history)
        return replace(self, memory=memory, history=history)

    def advance(self, history: TensorTree, positions: int) -> State:
        """Return the state after `positions` more target tokens."""
        return replace(self, history=history, length=self.length + positions)


class KVBuffer:
    """Keys and values of every layer, with spare capacity; the first `used` slots are written."""

    def __init__(self, key_LBNHP: Tensor, value_LBNPH: Tensor, used: int) -> None:
        # Keys are stored as they are multiplied, head width before slots: three times as fast on a CPU.
        self.key_LBNHP, self.value_LBNPH, self.used = key_LBNHP, value_LBNPH, used

    @property
    def capacity(self) -> int:
        return self.value_LBNPH.shape[3]

    @classmethod
    def allocate(cls, layers: Sequence[KeyValue], capacity: int) -> KVBuffer:
        """Copy these layers into a larger buffer; unwritten slots are zero."""
        B, N, P, H = layers[0].key_RNSH.shape
        value, L = layers[0].value_RNSH, len(layers)
        buffer = cls(value.new_zeros(L, B, N, H, capacity), value.new_zeros(L, B, N, capacity, value.shape[3]), P)
        for i, layer in enumerate(layers):
            buffer.write(i, 0, layer)
        return buffer

    def select(self, sentences_B: Tensor, used: int) -> KVBuffer:
        key_LBNHP, value_LBNPH = (x.index_select(1, sentences_B) for x in (self.key_LBNHP, self.value_LBNPH))
        return KVBuffer(key_LBNHP, value_LBNPH, used)

    def write(self, i: int, start: int, new: KeyValue) -> None:
        stop = start + new.key_RNSH.shape[2]
        self.key_LBNHP[i, ..., start:stop] = new.key_RNSH.transpose(2, 3)
        self.value_LBNPH[i, :, :, start:stop] = new.value_RNSH

    def layer(self, i: int, slots: int) -> KeyValue:
        return KeyValue(self.key_LBNHP[i, ..., :slots].transpose(2, 3), self.value_LBNPH[i, :, :, :slots], None)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the prefix: each is written once and never moves.

    The hypotheses of a sentence share its slots, and the bias masks the slots of the others; reordering moves a row
    of numbers and no keys. Buffers are append-only, and a buffer that another cache has already extended is
    copied first, so every cache is immutable.
    """

    layers: tuple[KeyValue, ...] = ()  # B rows, P slots
    buffer: KVBuffer | None = None  # storage that the layers view, once allocated
    bias_BKP: Tensor | None = None  # −∞ at slots of other hypotheses; None: no mask
    position_P: Tensor | None = None  # target position of each slot

    @property
    def slots(self) -> int:
        return self.layers[0].key_RNSH.shape[2] if self.layers else 0

    def select(self, sentences_B: Tensor, rows_R: Tensor, beam: int) -> KVCache:
        if not self.layers:
            return self
        bias_BKP = self.bias_BKP
        if bias_BKP is None and beam > 1:
            bias_BKP = self.layers[0].key_RNSH.new_zeros(len(self.layers[0].key_RNSH), 1, self.slots)
        if bias_BKP is not None:
            bias_BKP = bias_BKP.flatten(0, 1).index_select(0, rows_R).unflatten(0, (-1, beam))
        if self.buffer is None:
            layers = tuple(map_tensors(lambda x: x.index_select(0, sentences_B), kv) for kv in self.layers)
            return replace(self, layers=layers, bias_BKP=bias_BKP)
        buffer = self.buffer.select(sentences_B, self.slots)
        layers = tuple(buffer.layer(i, self.slots) for i in range(len(self.layers)))
        return replace(self, layers=layers, buffer=buffer, bias_BKP=bias_BKP)

    def join(self, other: KVCache) -> KVCache:
        """Concatenate two caches with the same slots; the next step allocates a new buffer."""
        if not self.layers:
            return self
        layers = concatenate_trees(self.layers, other.layers)
        return KVCache(layers, None, concatenate_trees(self.bias_BKP, other.bias_BKP), self.position_P)

    def reorder(self, rows_R: Tensor) -> KVCache:
        if self.bias_BKP is None:
            return self.select(rows_R, rows_R, 1)
        bias_BKP = self.bias_BKP.flatten(0, 1).index_select(0, rows_R).view_as(self.bias_BKP)
        return replace(self, bias_BKP=bias_BKP)


class CacheUpdate:
    """A cache being extended by T positions per hypothesis, layer by layer."""

    def __init__(self, state: State, like_RTD: Tensor) -> None:
        cache: KVCache = state.history
        self.cache, self.beam, self.positions = cache, state.beam, like_RTD.shape[1]
        slots, new = cache.slots, self.beam * self.positions
        self.layers: list[KeyValue] = []
        self.buffer = cache.buffer
        if slots and (self.buffer is None or self.buffer.used != slots or self.buffer.capacity < slots + new):
            self.buffer = KVBuffer.allocate(
                cache.layers, -(-(slots + SPARE_STEPS * new) // SLOT_MULTIPLE) * SLOT_MULTIPLE
            )
        self.slots = slots + new
        if self.buffer:
            self.buffer.used = self.slots
        # Attention reads the whole buffer, since it would have to copy a part; unwritten slots are masked.
        unwritten = self.buffer.capacity - self.slots if self.buffer else 0
        position_T = torch.arange(state.length, state.length + self.positions, device=like_RTD.device).repeat(self.beam)
        position_P = position_T if cache.position_P is None else torch.cat((cache.position_P, position_T))
        self.position_P = F.pad(position_P, (0, unwritten))
        # All slots belong to one hypothesis, in order.
        self.single_hypothesis = self.beam == 1 and cache.bias_BKP is None
        self.bias_BQP = None
        if not self.single_hypothesis:
            self.bias_BQP = F.pad(self._bias(len(like_RTD) // self.beam, like_RTD), (0, unwritten), value=-math.inf)

    def _bias(self, B: int, like: Tensor) -> Tensor:
        """Return −∞ for each new token at the slots of other hypotheses and of later tokens."""
        causal_TT = torch.ones(self.positions, self.positions, dtype=torch.bool, device=like.device).tril()
        visible_QQ = (
            torch.block_diag(*[causal_TT] * self.beam).bool() if len(causal_TT) > 1 else torch.eye(self.beam) > 0
        )
        visible_QQ = like.new_zeros(visible_QQ.shape).masked_fill(~visible_QQ.to(like.device), -math.inf)
        bias_BQQ = visible_QQ.expand(B, -1, -1)
        if self.cache.bias_BKP is None:
            return bias_BQQ
        return torch.cat((self.cache.bias_BKP.repeat_interleave(self.positions, 1), bias_BQQ), 2)

    def add(self, new: KeyValue) -> KeyValue:
        """Append new keys and values to the next layer's cache, and return all that its queries attend to."""
        if self.beam > 1:
            new = map_tensors(lambda x: x.unflatten(0, (-1, self.beam)).transpose(1, 2).flatten(2, 3), new)
        if self.buffer:
            i = len(self.layers)
            self.buffer.write(i, self.cache.slots, new)
            self.layers.append(self.buffer.layer(i, self.slots))
            new = self.buffer.layer(i, self.buffer.capacity)
        else:
            self.layers.append(new)
        return new if self.bias_BQP is None else new._replace(bias_R1QS=self.bias_BQP[:, None])

    def finish(self) -> KVCache:
        bias_BKP = (
            None if self.bias_BQP is None else self.bias_BQP[:, self.positions - 1 :: self.positions, : self.slots]
        )
        return KVCache(tuple(self.layers), self.buffer, bias_BKP, self.position_P[: self.slots])
