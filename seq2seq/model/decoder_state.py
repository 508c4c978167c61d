"""Decoder state between steps, as a value: the search selects, reorders and joins states without knowing the model.

Shapes: B sentences, K hypotheses of each, R = B × K rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class State(ABC):
    """B sentences with `beam` hypotheses each: B rows per sentence, B × beam per hypothesis, grouped by sentence."""

    length: int = field(default=0, kw_only=True)  # target positions decoded so far
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

    def sentences(self, rows_R: Tensor, beam: int) -> Tensor:
        """Return the sentence of every `beam` of the given rows."""
        return rows_R[::beam] // self.beam
