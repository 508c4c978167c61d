"""A copy of the model that computes in lower precision than its float32 master."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seq2seq.model.interface import Seq2Seq


class WorkingCopy:
    """The model that runs forward and backward: the master itself in float32, else a copy in lower precision.

    Weights are cast once per update, not at each use; the master and its optimizer stay in float32.
    """

    def __init__(self, master: Seq2Seq, precision: torch.dtype) -> None:
        is_master = precision == torch.float32
        self.model = master if is_master else copy.deepcopy(master).to(precision)
        self._pairs = [] if is_master else list(zip(master.parameters(), self.model.parameters(), strict=True))

    @torch.no_grad()
    def transfer_gradients(self) -> None:
        """Add the copy's gradients to the master's; a sum of many in lower precision would lose the small ones."""
        pairs = [(master, working, working.grad) for master, working in self._pairs if working.grad is not None]
        if not pairs:
            return
        # Lists of tensors take a few kernels, where one for each would keep a GPU waiting.
        gradients = [torch.empty_like(master) for master, _, _ in pairs]
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
    def sync_weights(self) -> None:
        """Copy the master's weights after they changed."""
        if self._pairs:
            masters, workings = map(list, zip(*self._pairs, strict=True))
            torch._foreach_copy_(workings, masters)

    @contextmanager
    def with_weights(self, weights: dict[str, Tensor] | None) -> Iterator[Seq2Seq]:
        """Yield the working model, temporarily with the given weights, if any."""
        parameters = dict(self.model.named_parameters())
        backup = {name: p.detach().clone() for name, p in parameters.items()} if weights else {}
        with torch.no_grad():
            for name, weight in (weights or {}).items():
                parameters[name].copy_(weight)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, weight in backup.items():
                    parameters[name].copy_(weight)
