"""Decoder state between steps, as a value: the search selects, reorders and joins states without knowing the model.

Shapes: B sentences, K hypotheses of each, R = B × K rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class State(ABC):
    """B sentences with `beam` hypotheses each: B rows per sentence, B × beam per hypothesis, grouped by sentence."""

    # Target positions decoded so far; in a fixed state a number of the device.
    length: int | Tensor = field(default=0, kw_only=True)
    beam: int = field(default=1, kw_only=True)

    @abstractmethod
    def select(self, rows_R: Tensor, beam: int) -> Self:
        """Return the given rows as a new state with `beam` rows per kept sentence."""

    @abstractmethod
    def reorder(self, rows_R: Tensor) -> Self:
        """Reorder hypotheses within their sentences; what belongs to a sentence stays unchanged."""

    @abstractmethod
    def join(self, other: Self) -> Self:
        """Concatenate two states of the same beam and length."""

    def independent(self) -> State:
        """Return this state as one that no later step of another state changes."""
        return self

    def fixed(self, sentences: int, steps: int) -> Self:
        """Return this state with room for these, its length on the device: no step changes a shape or an address."""
        raise NotImplementedError

    def plain(self, length: int) -> Self:
        """Return what a fixed state holds after `length` steps, with all its room for sentences."""
        raise NotImplementedError

    def sentences(self, rows_R: Tensor, beam: int) -> Tensor:
        """Return the sentence of every `beam` of the given rows."""
        return rows_R[::beam] // self.beam


def on_device(length: int | Tensor, like: Tensor) -> Tensor:
    return like.new_full((), int(length), dtype=torch.int64)


def bucket(count: int, least: int) -> int:
    """Round up to one of a few sizes, two for each doubling: each size costs the capture of a graph."""
    unit = max(least, 1 << max(0, (count - 1).bit_length() - 2))
    return -(-count // unit) * unit
