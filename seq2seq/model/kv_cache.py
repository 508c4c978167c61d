"""The keys and values of the prefix, cached between decoding steps.

Shapes: B sentences, K hypotheses of each, R = B × K rows, T new positions, Q = K × T new slots, P slots, N heads,
H head width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from seq2seq.model import attention
from seq2seq.model.attention import KeyValue, Start, as_stored, enlarged

SPARE_STEPS = 6  # additional steps allocated when a cache grows
FUSED_SPARE_STEPS = 32  # on a GPU more, as each allocation and each new shape costs a launch or a plan
SLOT_MULTIPLE = 16  # capacities are rounded up to this multiple, for vector instructions


class KVBuffer:
    """Keys and values of every layer, with spare capacity; the first `used` slots are written."""

    def __init__(self, key_LBNPH: Tensor, value_LBNPH: Tensor, used: int) -> None:
        self.key_LBNPH, self.value_LBNPH, self.used = key_LBNPH, value_LBNPH, used

    @property
    def capacity(self) -> int:
        return self.value_LBNPH.shape[3]

    @classmethod
    def allocate(cls, layers: Sequence[KeyValue], new: int) -> KVBuffer:
        """Copy these layers into a buffer with spare capacity for steps of `new` slots; unwritten slots are zero."""
        value = layers[0].value_RNSH
        B, N, P, H = value.shape
        value_LBNPH = value.new_zeros(len(layers), B, N, grown_capacity(P, new, value), H)
        key = torch.zeros_like(as_stored(value_LBNPH), memory_format=torch.contiguous_format)
        buffer = cls(as_stored(key), value_LBNPH, P)
        for i, layer in enumerate(layers):
            buffer.write(i, 0, layer)
        return buffer

    def select(self, sentences_B: Tensor, used: int) -> KVBuffer:
        key = as_stored(self.key_LBNPH).index_select(1, sentences_B)
        return KVBuffer(as_stored(key), self.value_LBNPH.index_select(1, sentences_B), used)

    def write(self, i: int, start: int, new: KeyValue) -> None:
        stop = start + new.key_RNSH.shape[2]
        self.key_LBNPH[i, :, :, start:stop] = new.key_RNSH
        self.value_LBNPH[i, :, :, start:stop] = new.value_RNSH

    def layer(self, i: int, slots: int) -> KeyValue:
        return KeyValue(self.key_LBNPH[i, :, :, :slots], self.value_LBNPH[i, :, :, :slots], None)


def grown_capacity(slots: int, new: int, like: Tensor) -> int:
    """Return the capacity of a buffer that has to grow: by some steps, and by half its size on a GPU."""
    capacity = slots + SPARE_STEPS * new
    if attention.use_fused_kernel(like):
        capacity = slots + max(FUSED_SPARE_STEPS * new, slots // 2)
    return -(-capacity // SLOT_MULTIPLE) * SLOT_MULTIPLE


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the prefix: each is written once and never moves.

    The hypotheses of a sentence share its slots, and the bias masks the slots of the others; reordering moves a row
    of numbers and no keys. Buffers are append-only, and a buffer that another cache has already extended is
    copied first, so a cache never changes.
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
            return replace(self, layers=tuple(kv.select(sentences_B) for kv in self.layers), bias_BKP=bias_BKP)
        buffer = self.buffer.select(sentences_B, self.slots)
        layers = tuple(buffer.layer(i, self.slots) for i in range(len(self.layers)))
        return replace(self, layers=layers, buffer=buffer, bias_BKP=bias_BKP)

    def reorder(self, rows_R: Tensor) -> KVCache:
        if self.bias_BKP is None:
            return self.select(rows_R, rows_R, 1)
        return replace(self, bias_BKP=reordered(self.bias_BKP, rows_R))

    def update(self, start: Start, beam: int, like_RTD: Tensor) -> CacheUpdate:
        assert isinstance(start, int)
        return GrowingUpdate(self, start, beam, like_RTD)

    def fixed(self, sentences: int, steps: int, beam: int, memory: tuple[KeyValue, ...]) -> FixedCache:
        """Return a cache with zeros for the sentences and steps to come; the memory has the shapes of an empty one."""
        layers = self.layers or tuple(KeyValue(kv.key_RNSH[:, :, :0], kv.value_RNSH[:, :, :0], None) for kv in memory)
        B, N, P, H = layers[0].key_RNSH.shape
        large = (sentences, N, steps * beam, H)
        bias_BKP = layers[0].key_RNSH.new_zeros(B, beam, P) if self.bias_BKP is None else self.bias_BKP
        return FixedCache(
            tuple(KeyValue(enlarged(kv.key_RNSH, large), enlarged(kv.value_RNSH, large), None) for kv in layers),
            bias_BKP=enlarged(bias_BKP, (sentences, beam, steps * beam), -math.inf),
            position_P=torch.arange(steps, device=bias_BKP.device).repeat_interleave(beam),
        )

    def join(self, other: KVCache) -> KVCache:
        """Concatenate two caches with the same slots; the next step allocates a new buffer."""
        layers = tuple(a.join(b) for a, b in zip(self.layers, other.layers, strict=True))
        bias_BKP = None
        if self.bias_BKP is not None and other.bias_BKP is not None:
            bias_BKP = torch.cat((self.bias_BKP, other.bias_BKP))
        return KVCache(layers, None, bias_BKP, self.position_P)


@dataclass(frozen=True)
class FixedCache:
    """Keys and values with room for some steps, each of which changes these tensors at a position on the device."""

    layers: tuple[KeyValue, ...]
    bias_BKP: Tensor  # −∞ at slots of other hypotheses, and at those that no step has written
    position_P: Tensor

    def reorder(self, rows_R: Tensor) -> FixedCache:
        return replace(self, bias_BKP=reordered(self.bias_BKP, rows_R))

    def update(self, start: Start, beam: int, like_RTD: Tensor) -> CacheUpdate:
        return FixedUpdate(self, start, beam, like_RTD)

    def plain(self, length: int, beam: int) -> KVCache:
        """Return the slots that the first steps wrote."""
        slots = slice(length * beam)
        layers = tuple(KeyValue(kv.key_RNSH[:, :, slots], kv.value_RNSH[:, :, slots], None) for kv in self.layers)
        return KVCache(layers, None, self.bias_BKP[:, :, slots] if beam > 1 else None, self.position_P[slots])


def reordered(bias_BKP: Tensor, rows_R: Tensor) -> Tensor:
    """Return which slots each hypothesis sees after a reordering."""
    return bias_BKP.flatten(0, 1).index_select(0, rows_R).view_as(bias_BKP)


class CacheUpdate(Protocol):
    """A cache being extended, layer by layer; the first new position of each hypothesis is `start`."""

    start: Start
    position_P: Tensor
    single_hypothesis: bool  # all slots belong to one hypothesis, in order

    def add(self, new: KeyValue) -> KeyValue:
        """Add new keys and values to the next layer's, and return all that its queries attend to."""

    def finish(self) -> KVCache | FixedCache: ...


def merged_hypotheses(x_RNTH: Tensor, beam: int) -> Tensor:
    """Make the positions of a sentence's hypotheses its slots."""
    return x_RNTH.unflatten(0, (-1, beam)).transpose(1, 2).flatten(2, 3)


class GrowingUpdate:
    """A cache being extended by T positions per hypothesis."""

    def __init__(self, cache: KVCache, start: int, beam: int, like_RTD: Tensor) -> None:
        self.start: Start = start
        self.cache, self.beam, self.positions = cache, beam, like_RTD.shape[1]
        slots, new = cache.slots, beam * self.positions
        self.layers: list[KeyValue] = []
        self.buffer = cache.buffer
        if slots and (self.buffer is None or self.buffer.used != slots or self.buffer.capacity < slots + new):
            self.buffer = KVBuffer.allocate(cache.layers, new)
        self.slots = slots + new
        if self.buffer:
            self.buffer.used = self.slots
        # Attention reads the whole buffer, since it would have to copy a part; unwritten slots are masked.
        unwritten = self.buffer.capacity - self.slots if self.buffer else 0
        position_T = torch.arange(start, start + self.positions, device=like_RTD.device).repeat(beam)
        position_P = position_T if cache.position_P is None else torch.cat((cache.position_P, position_T))
        self.position_P = F.pad(position_P, (0, unwritten))
        self.single_hypothesis = beam == 1 and cache.bias_BKP is None
        self.bias_BQP = None
        if not self.single_hypothesis:
            self.bias_BQP = F.pad(self._bias(len(like_RTD) // beam, like_RTD), (0, unwritten), value=-math.inf)

    def _bias(self, B: int, like: Tensor) -> Tensor:
        """Return −∞ for each new token at the slots of other hypotheses and of later tokens."""
        if self.positions == 1:  # as in every step of a search
            visible_QQ = torch.eye(self.beam, device=like.device) > 0
        else:
            causal_TT = torch.ones(self.positions, self.positions, dtype=torch.bool, device=like.device).tril()
            visible_QQ = torch.block_diag(*[causal_TT] * self.beam)
        visible_QQ = like.new_zeros(visible_QQ.shape).masked_fill(~visible_QQ, -math.inf)
        bias_BQQ = visible_QQ.expand(B, -1, -1)
        if self.cache.bias_BKP is None:
            return bias_BQQ
        return torch.cat((self.cache.bias_BKP.repeat_interleave(self.positions, 1), bias_BQQ), 2)

    def add(self, new: KeyValue) -> KeyValue:
        if self.beam > 1:
            key_BNQH, value_BNQH = (merged_hypotheses(x_RNTH, self.beam) for x_RNTH in new[:2])
            new = KeyValue(key_BNQH, value_BNQH, None)
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


class FixedUpdate:
    """A fixed cache being extended by one position per hypothesis; unwritten slots are masked."""

    def __init__(self, cache: FixedCache, start: Start, beam: int, like_RTD: Tensor) -> None:
        assert like_RTD.shape[1] == 1
        self.cache, self.start, self.beam = cache, start, beam
        self.added, self.position_P, self.single_hypothesis = 0, cache.position_P, False
        self.slot_K = start * beam + torch.arange(beam, device=like_RTD.device)
        own_KK = like_RTD.new_full((beam, beam), -math.inf).fill_diagonal_(0)
        self.bias_BKP = cache.bias_BKP.index_copy_(2, self.slot_K, own_KK.expand(len(cache.bias_BKP), -1, -1))

    def add(self, new: KeyValue) -> KeyValue:
        layer = self.cache.layers[self.added]
        for slots_BNPH, new_RN1H in zip(layer[:2], new[:2], strict=True):
            slots_BNPH.index_copy_(2, self.slot_K, merged_hypotheses(new_RN1H, self.beam))
        self.added += 1
        return layer._replace(bias_R1QS=self.bias_BKP[:, None])

    def finish(self) -> FixedCache:
        return self.cache
