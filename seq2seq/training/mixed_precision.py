"""A copy of the model that computes in lower precision than its float32 master."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from seq2seq.model.interface import Seq2Seq


class WorkingCopy:
    """The model that runs forward and backward: the master itself in float32, else a copy in lower precision.

    Weights are cast once per update, not at each use; the master and its optimizer stay in float32.
    """

    def __init__(self, master: Seq2Seq, precision: torch.dtype) -> None:
        is_master = precision == torch.float32
        self.model = master if is_master else copy.deepcopy(master).to(precision)
        self._pairs = [] if is_master else list(zip(master.parameters(), self.model.parameters(), strict=True))
        self._masters: dict[Tensor, Tensor] = {working: master for master, working in self._pairs}
        self._updated = self._pairs  # those that this process updates
        self._buffers: dict[nn.Parameter, Tensor] = {}

    def divide(self, owned: Iterable[nn.Parameter], buffers: dict[nn.Parameter, Tensor]) -> None:
        """Leave gradients in these buffers of the master's parameters, and sync only the owned weights."""
        kept = set(owned)
        self._updated = [(master, working) for master, working in self._pairs if master in kept]
        self._buffers = buffers

    @torch.no_grad()
    def transfer_gradients(self) -> None:
        """Add the copy's gradients to the master's; a sum of many in lower precision would lose the small ones."""
        pairs = [(master, working, working.grad) for master, working in self._pairs if working.grad is not None]
        if not pairs:
            return
        # Lists of tensors take a few kernels, where one for each would keep a GPU waiting.
        gradients = [self._buffer(master) for master, _, _ in pairs]
        torch._foreach_copy_(gradients, [gradient for _, _, gradient in pairs])
        sums, summands = [], []
        for (master, working, _), gradient in zip(pairs, gradients, strict=True):
            working.grad = None
            if master.grad is None:
                master.grad = gradient
            else:
                sums.append(master.grad)
                summands.append(gradient)
        if sums:
            torch._foreach_add_(sums, summands)

    @torch.no_grad()
    def accumulate(self, workings: list[Tensor], flat: Tensor) -> Tensor:
        """Make these gradients of the copy, which lie one after the other, the master's → all of them in float32.

        Those of the update's earlier batches are added.
        """
        if not self._pairs:
            return flat
        masters = [self._masters.get(working, working) for working in workings]  # others are in float32 themselves
        sums = flat.float()
        parts = [part.view_as(p) for part, p in zip(sums.split([p.numel() for p in masters]), masters, strict=True)]
        for master, part in zip(masters, parts, strict=True):
            if master.grad is not None:
                part += master.grad
            master.grad = part
        return sums

    def drop_gradients(self) -> None:
        """Forget the copy's gradients, which the master has; where the copy has none, no process has one."""
        for master, working in self._pairs:
            if working.grad is None:
                master.grad = None
            working.grad = None

    def _buffer(self, master: nn.Parameter) -> Tensor:
        """Return memory for a gradient; the buffer holds the sum of an update's earlier batches, if any."""
        return self._buffers[master] if master in self._buffers and master.grad is None else torch.empty_like(master)

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the master's weights after they changed."""
        if self._updated:
            masters, workings = map(list, zip(*self._updated, strict=True))
            torch._foreach_copy_(workings, masters)

    @contextmanager
    def with_weights(self, weights: dict[str, Tensor] | None) -> Iterator[Seq2Seq]:
        """Yield the working model, temporarily with the given weights, if any."""
        parameters = dict(self.model.named_parameters())
        backup = {name: parameters[name].detach().clone() for name in weights or {}}
        with torch.no_grad():
            for name, weight in (weights or {}).items():
                parameters[name].copy_(weight)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, weight in backup.items():
                    parameters[name].copy_(weight)
