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

Tree = Any  # a Tensor, a Past, None, or a (named) tuple of trees
AHEAD = 6  # steps of room allocated when a past grows, …
WHOLE = 16  # … rounded up to this multiple for vector instructions


def map_tree(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """Apply a function to each tensor and past of a tree."""
    if isinstance(tree, (Tensor, Past)):
        return function(tree)
    if tree is None:
        return None
    mapped = (map_tree(function, part) for part in tree)
    return type(tree)(*mapped) if hasattr(tree, "_fields") else tuple(mapped)


def join_trees(a: Tree, b: Tree) -> Tree:
    """Concatenate the rows of two trees."""
    if isinstance(a, Tensor):
        return torch.cat((a, b))
    if isinstance(a, (KeyValue, Past)):
        return a.join(b)
    return None if a is None else tuple(map(join_trees, a, b))


@dataclass(frozen=True)
class State:
    """B sentences with `beam` hypotheses each: `fixed` has B rows, `moving` B × beam, grouped by sentence."""

    fixed: Tree  # per sentence: the projected memory
    moving: Tree  # per hypothesis: past keys and values, or recurrent states
    length: int = 0  # target positions decoded so far
    beam: int = 1

    def select(self, rows_R: Tensor, beam: int) -> State:
        """Return the given rows as a new state with `beam` rows per kept sentence."""
        sentences_B = rows_R[::beam] // self.beam
        fixed = map_tree(lambda x: x.index_select(0, sentences_B), self.fixed)

        def rows(x: Tensor | Past) -> Tensor | Past:
            return x.index_select(0, rows_R) if isinstance(x, Tensor) else x.select(sentences_B, rows_R, beam)

        return replace(self, fixed=fixed, moving=map_tree(rows, self.moving), beam=beam)

    def reorder(self, rows_R: Tensor) -> State:
        """Reorder hypotheses within their sentences; per-sentence tensors stay unchanged."""

        def rows(x: Tensor | Past) -> Tensor | Past:
            return x.index_select(0, rows_R) if isinstance(x, Tensor) else x.reorder(rows_R)

        return replace(self, moving=map_tree(rows, self.moving))

    def join(self, other: State) -> State:
        """Concatenate two states of the same beam and length."""
        fixed, moving = join_trees(self.fixed, other.fixed), join_trees(self.moving, other.moving)
        return replace(self, fixed=fixed, moving=moving)

    def advance(self, moving: Tree, positions: int) -> State:
        """Return the state after `positions` more target tokens."""
        return replace(self, moving=moving, length=self.length + positions)


class Buffer:
    """Keys and values of every layer, with spare room; the first `used` slots are written."""

    def __init__(self, key_LBNHP: Tensor, value_LBNPH: Tensor, used: int) -> None:
        # Keys are stored as they are multiplied, head width before slots: three times as fast on a CPU.
        self.key_LBNHP, self.value_LBNPH, self.used = key_LBNHP, value_LBNPH, used

    @property
    def room(self) -> int:
        return self.value_LBNPH.shape[3]

    @classmethod
    def of(cls, layers: Sequence[KeyValue], room: int) -> Buffer:
        """Copy these layers into a larger buffer; unwritten slots are zero."""
        B, N, P, H = layers[0].key_RNSH.shape
        value, L = layers[0].value_RNSH, len(layers)
        buffer = cls(value.new_zeros(L, B, N, H, room), value.new_zeros(L, B, N, room, value.shape[3]), P)
        for i, layer in enumerate(layers):
            buffer.write(i, 0, layer)
        return buffer

    def select(self, sentences_B: Tensor, used: int) -> Buffer:
        kept_LBNHP, kept_LBNPH = (x.index_select(1, sentences_B) for x in (self.key_LBNHP, self.value_LBNPH))
        return Buffer(kept_LBNHP, kept_LBNPH, used)

    def write(self, i: int, start: int, new: KeyValue) -> None:
        stop = start + new.key_RNSH.shape[2]
        self.key_LBNHP[i, ..., start:stop] = new.key_RNSH.transpose(2, 3)
        self.value_LBNPH[i, :, :, start:stop] = new.value_RNSH

    def layer(self, i: int, slots: int) -> KeyValue:
        return KeyValue(self.key_LBNHP[i, ..., :slots].transpose(2, 3), self.value_LBNPH[i, :, :, :slots], None)


@dataclass(frozen=True)
class Past:
    """Keys and values of the prefix: each is written once and never moves.

    The hypotheses of a sentence share its slots, and the bias masks the slots of the others; reordering moves a row
    of numbers and no keys. Buffers are append-only, and a buffer that another past has already extended is copied
    first, so every past is immutable.
    """

    layers: tuple[KeyValue, ...] = ()  # B rows, P slots
    buffer: Buffer | None = None  # storage that the layers view, once allocated
    bias_BKP: Tensor | None = None  # −∞ at slots of other hypotheses; None: no mask
    place_P: Tensor | None = None  # target position of each slot

    @property
    def slots(self) -> int:
        return self.layers[0].key_RNSH.shape[2] if self.layers else 0

    def select(self, sentences_B: Tensor, rows_R: Tensor, beam: int) -> Past:
        if not self.layers:
            return self
        bias_BKP = self.bias_BKP
        if bias_BKP is None and beam > 1:
            bias_BKP = self.layers[0].key_RNSH.new_zeros(len(self.layers[0].key_RNSH), 1, self.slots)
        if bias_BKP is not None:
            bias_BKP = bias_BKP.flatten(0, 1).index_select(0, rows_R).unflatten(0, (-1, beam))
        if self.buffer is None:
            layers = tuple(map_tree(lambda x: x.index_select(0, sentences_B), kv) for kv in self.layers)
            return replace(self, layers=layers, bias_BKP=bias_BKP)
        buffer = self.buffer.select(sentences_B, self.slots)
        layers = tuple(buffer.layer(i, self.slots) for i in range(len(self.layers)))
        return replace(self, layers=layers, buffer=buffer, bias_BKP=bias_BKP)

    def join(self, other: Past) -> Past:
        """Concatenate two pasts with the same slots; the next step allocates a new buffer."""
        if not self.layers:
            return self
        layers = join_trees(self.layers, other.layers)
        return Past(layers, None, join_trees(self.bias_BKP, other.bias_BKP), self.place_P)

    def reorder(self, rows_R: Tensor) -> Past:
        if self.bias_BKP is None:
            return self.select(rows_R, rows_R, 1)
        bias_BKP = self.bias_BKP.flatten(0, 1).index_select(0, rows_R).view_as(self.bias_BKP)
        return replace(self, bias_BKP=bias_BKP)


class Continuation:
    """A past being extended by T positions per hypothesis, layer by layer."""

    def __init__(self, state: State, like_RTD: Tensor) -> None:
        past: Past = state.moving
        self.past, self.beam, self.positions = past, state.beam, like_RTD.shape[1]
        slots, new = past.slots, self.beam * self.positions
        self.layers: list[KeyValue] = []
        self.buffer = past.buffer
        if slots and (self.buffer is None or self.buffer.used != slots or self.buffer.room < slots + new):
            self.buffer = Buffer.of(past.layers, -(-(slots + AHEAD * new) // WHOLE) * WHOLE)
        self.slots = slots + new
        if self.buffer:
            self.buffer.used = self.slots
        # Attention reads the whole buffer, since it would have to copy a part; unwritten slots are masked.
        empty = self.buffer.room - self.slots if self.buffer else 0
        place_T = torch.arange(state.length, state.length + self.positions, device=like_RTD.device).repeat(self.beam)
        place_P = place_T if past.place_P is None else torch.cat((past.place_P, place_T))
        self.place_P = F.pad(place_P, (0, empty))
        self.alone = self.beam == 1 and past.bias_BKP is None  # all slots belong to this hypothesis, in order
        self.bias_BQP = None
        if not self.alone:
            self.bias_BQP = F.pad(self._bias(len(like_RTD) // self.beam, like_RTD), (0, empty), value=-math.inf)

    def _bias(self, B: int, like: Tensor) -> Tensor:
        """Return −∞ for each new token at the slots of other hypotheses and of later tokens."""
        own_TT = torch.ones(self.positions, self.positions, dtype=torch.bool, device=like.device).tril()
        own_QQ = torch.block_diag(*[own_TT] * self.beam).bool() if len(own_TT) > 1 else torch.eye(self.beam) > 0
        own_QQ = like.new_zeros(own_QQ.shape).masked_fill(~own_QQ.to(like.device), -math.inf)
        own_BQQ = own_QQ.expand(B, -1, -1)
        if self.past.bias_BKP is None:
            return own_BQQ
        return torch.cat((self.past.bias_BKP.repeat_interleave(self.positions, 1), own_BQQ), 2)

    def add(self, new: KeyValue) -> KeyValue:
        """Append new keys and values to the next layer's past, and return all that its queries attend to."""
        if self.beam > 1:
            new = map_tree(lambda x: x.unflatten(0, (-1, self.beam)).transpose(1, 2).flatten(2, 3), new)
        if self.buffer:
            i = len(self.layers)
            self.buffer.write(i, self.past.slots, new)
            self.layers.append(self.buffer.layer(i, self.slots))
            new = self.buffer.layer(i, self.buffer.room)
        else:
            self.layers.append(new)
        return new if self.bias_BQP is None else new._replace(bias_R1QS=self.bias_BQP[:, None])

    def end(self) -> Past:
        bias_BKP = (
            None if self.bias_BQP is None else self.bias_BQP[:, self.positions - 1 :: self.positions, : self.slots]
        )
        return Past(tuple(self.layers), self.buffer, bias_BKP, self.place_P[: self.slots])
