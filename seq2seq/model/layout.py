"""How the tokens of a batch lie in memory: as padded rows, or packed without the padding.

Shapes: R rows, T positions, P = R × T, M real tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from seq2seq.data.encoding import Batch


class Layout(Protocol):
    """Token-wise layers work on either layout; attention needs padded rows, or the bounds of packed ones."""

    @property
    def bounds(self) -> Tensor | None: ...

    def pack(self, x_RTD: Tensor) -> Tensor: ...

    def unpack(self, x: Tensor) -> Tensor: ...


class Padded:
    """Padded rows throughout."""

    bounds = None

    def pack(self, x_RTD: Tensor) -> Tensor:
        return x_RTD

    def unpack(self, x: Tensor) -> Tensor:
        return x


PADDED = Padded()


class Packed(NamedTuple):
    """Indices of the real tokens in padded rows, so that token-wise layers compute no padding."""

    index_M: Tensor  # flat index of each real token, row by row
    rows: int
    width: int
    bounds: Tensor | None = None  # where each row begins among the real tokens, and where the last ends; None: unknown

    @classmethod
    def source(cls, batch: Batch) -> Packed:
        return cls(batch.source_index_M, *batch.source_BS.shape)

    @classmethod
    def target(cls, batch: Batch) -> Packed:
        return cls(batch.target_index_M, *batch.target_in_BT.shape)

    def with_bounds(self) -> Packed:
        """Find where each row begins, once for all layers, and without a wait on a GPU."""
        first_index = torch.arange(0, (self.rows + 1) * self.width, self.width, device=self.index_M.device)
        return self._replace(bounds=torch.searchsorted(self.index_M, first_index, out_int32=True))

    @property
    def sentence_M(self) -> Tensor:
        return self.index_M // self.width

    @property
    def position_M(self) -> Tensor:
        return self.index_M % self.width

    def pack(self, x_RTD: Tensor) -> Tensor:
        packed_MD: Tensor = _Pack.apply(x_RTD.flatten(0, 1), self.index_M)  # type: ignore[no-untyped-call]
        return packed_MD

    def unpack(self, x: Tensor) -> Tensor:
        """Restore padded rows, with zeros for padding."""
        padded_PD = x.new_zeros(self.rows * self.width, x.shape[1])
        return padded_PD.index_copy(0, self.index_M, x).view(self.rows, self.width, -1)


class _Pack(torch.autograd.Function):
    """Select rows, none twice, so that the backward pass copies where torch's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, index_M: Tensor) -> Tensor:
        ctx.save_for_backward(index_M)
        ctx.rows = len(x_PD)
        return x_PD.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None]:
        (index_M,) = ctx.saved_tensors
        return grad_MD.new_zeros(ctx.rows, grad_MD.shape[1]).index_copy_(0, index_M, grad_MD), None
