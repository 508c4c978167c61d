"""Losses as their papers write them, from logits, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def smoothed_cross_entropy(logits_MV: Tensor, targets_M: Tensor, smoothing: float) -> Tensor:
    """Σ −q · log p with q = (1 − ε) · one-hot + ε / V (Szegedy et al. 2016, §7)."""
    V = logits_MV.shape[1]
    total = logits_MV.new_zeros((), dtype=torch.float64)
    for logits_V, target in zip(logits_MV.double(), targets_M.tolist(), strict=True):
        log_p_V = logits_V - torch.logsumexp(logits_V, 0)
        q_V = torch.full((V,), smoothing / V, dtype=torch.float64)
        q_V[target] += 1 - smoothing
        total = total - (q_V * log_p_V).sum()
    return total


def kl(p_logits_MV: Tensor, q_logits_MV: Tensor) -> Tensor:
    """Σ p · (log p − log q) over words, summed over tokens."""
    p_MV, q_MV = (torch.softmax(x.double(), -1) for x in (p_logits_MV, q_logits_MV))
    return (p_MV * (p_MV.log() - q_MV.log())).sum()


def r_drop(first_MV: Tensor, second_MV: Tensor, targets_M: Tensor, smoothing: float, alpha: float) -> Tensor:
    """Half of L = CE₁ + CE₂ + α · ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)) (Liang et al. 2021, §2.1): at α = 0 a plain loss."""
    ce = sum(smoothed_cross_entropy(x, targets_M, smoothing) for x in (first_MV, second_MV))
    both_ways = 0.5 * (kl(first_MV, second_MV) + kl(second_MV, first_MV))
    return 0.5 * (ce + alpha * both_ways)


def simcut(whole_MV: Tensor, cut_MV: Tensor, targets_M: Tensor, smoothing: float, alpha: float) -> Tensor:
    """CE(whole) + α · KL(whole ‖ cut) (Gao et al. 2022, §3.2)."""
    return smoothed_cross_entropy(whole_MV, targets_M, smoothing) + alpha * kl(whole_MV, cut_MV)
