"""AdamW over float32 parameters, and the copy of them that computes in another precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from seq2seq.config import OptimizerConfig
from seq2seq.model.seq2seq import Seq2Seq


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decay pulls on matrices only: a gain or a bias has no direction to forget."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.rate,
        betas=(beta1, beta2),
        eps=config.epsilon,
        fused=True,
    )


class WorkingCopy:
    """The model that runs forward and backward: the master itself in float32, else a copy in lower precision.

    Weights are cast once an update, not at each use; the master and its optimizer stay in float32.
    """

    def __init__(self, master: Seq2Seq, precision: torch.dtype) -> None:
        same = precision == torch.float32
        self.model = master if same else copy.deepcopy(master).to(precision)
        self._pairs = [] if same else list(zip(master.parameters(), self.model.parameters(), strict=True))

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """The copy's gradients added to the master's: in lower precision a sum of many would lose the small ones."""
        for master, working in self._pairs:
            if working.grad is not None:
                gradient, working.grad = working.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def take_weights(self) -> None:
        """The master's weights, after it changed."""
        if self._pairs:
            masters, workings = map(list, zip(*self._pairs, strict=True))
            torch._foreach_copy_(workings, masters)


def clip(gradients: list[Tensor], highest: float) -> float:
    """Scale all gradients so that their common norm is at most `highest` (0: no limit) → the norm before."""
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
    if 0 < highest < norm:
        torch._foreach_mul_(gradients, highest / norm)
    return norm
