"""Optimizers as their papers write them, one parameter at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tensors = list[Tensor]


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, for one group of parameters."""

    def __init__(self, start: Tensors, betas: tuple[float, float], epsilon: float, decay: float) -> None:
        self.x = [p.detach().double().clone() for p in start]
        self.m = [torch.zeros_like(p) for p in self.x]
        self.v = [torch.zeros_like(p) for p in self.x]
        self.betas, self.epsilon, self.decay, self.t = betas, epsilon, decay, 0

    def step(self, gradients: Tensors, lr: float) -> None:
        self.t += 1
        beta1, beta2 = self.betas
        for i, g in enumerate(gradients):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * g
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            m_hat = self.m[i] / (1 - beta1**self.t)
            v_hat = self.v[i] / (1 - beta2**self.t)
            self.x[i] = self.x[i] - lr * (m_hat / (v_hat.sqrt() + self.epsilon) + self.decay * self.x[i])


class ScheduleFreeAdamW:
    """Defazio et al. 2024, algorithm 1, with x, y and z; the bias of v is corrected as in the authors' code."""

    def __init__(self, start: Tensors, betas: tuple[float, float], epsilon: float, decay: float) -> None:
        self.x = [p.detach().double().clone() for p in start]
        self.z = [p.clone() for p in self.x]
        self.v = [torch.zeros_like(p) for p in self.x]
        self.betas, self.epsilon, self.decay = betas, epsilon, decay
        self.lrs: list[float] = []

    @property
    def y(self) -> Tensors:
        """Where gradients are taken."""
        beta1 = self.betas[0]
        return [(1 - beta1) * z + beta1 * x for x, z in zip(self.x, self.z, strict=True)]

    def step(self, gradients: Tensors, lr: float) -> None:
        ys = self.y
        self.lrs.append(lr)
        total = sum(one**2 for one in self.lrs)
        c = lr**2 / total if total else 0.0
        beta2 = self.betas[1]
        for i, g in enumerate(gradients):
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            v_hat = self.v[i] / (1 - beta2 ** len(self.lrs))
            self.z[i] = self.z[i] - lr * g / (v_hat.sqrt() + self.epsilon) - lr * self.decay * ys[i]
            self.x[i] = (1 - c) * self.x[i] + c * self.z[i]


class Adafactor:
    """Shazeer & Stern 2018, algorithms 4 and 5, with relative steps; v decays by 1 − t^−0.8, and no momentum."""

    def __init__(self, start: Tensors, decay: float) -> None:
        self.x = [p.detach().double().clone() for p in start]
        self.v: list[Tensors] = [[] for _ in start]
        self.decay, self.t = decay, 0

    def step(self, gradients: Tensors, lr: float) -> None:
        self.t += 1
        beta2 = 1 - self.t**-0.8
        for i, g in enumerate(gradients):
            # The decay pulls before the step; the step is relative to the size of what it moves.
            size = max(1e-3, rms(self.x[i])) * min(lr, 1 / math.sqrt(self.t))
            self.x[i] = self.x[i] * (1 - lr * self.decay)
            square = g**2
            now = [square.mean(-1, keepdim=True), square.mean(-2, keepdim=True)] if g.dim() > 1 else [square]
            old = self.v[i] or [torch.zeros_like(part) for part in now]
            self.v[i] = [beta2 * a + (1 - beta2) * b for a, b in zip(old, now, strict=True)]
            if g.dim() > 1:
                rows, columns = self.v[i]
                v = rows * columns / rows.mean(-2, keepdim=True).clamp(min=torch.finfo(torch.float64).eps)
            else:
                v = self.v[i][0]
            u = g / v.clamp(min=torch.finfo(torch.float64).eps ** 2).sqrt()
            self.x[i] = self.x[i] - size * u / max(1.0, rms(u))


class Muon:
    """Jordan et al. 2024: Nesterov momentum, made orthogonal by five quintic Newton-Schulz steps in bfloat16.

    A step is as long as one of AdamW: 0.2 · √(longer side) (Liu et al. 2025, §2.2).
    """

    def __init__(self, start: Tensors, decay: float, momentum: float = 0.95) -> None:
        self.x = [p.detach().double().clone() for p in start]
        self.m = [torch.zeros_like(p) for p in self.x]
        self.decay, self.momentum = decay, momentum

    def step(self, gradients: Tensors, lr: float) -> None:
        mu = self.momentum
        for i, g in enumerate(gradients):
            self.m[i] = mu * self.m[i] + (1 - mu) * g
            direction = orthogonal(mu * self.m[i] + (1 - mu) * g).double()
            self.x[i] = self.x[i] * (1 - lr * self.decay) - lr * 0.2 * math.sqrt(max(g.shape)) * direction


def orthogonal(g: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    if g.shape[0] > g.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if g.shape[0] > g.shape[1] else x


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def clipped(gradients: Tensors, highest: float) -> tuple[Tensors, float]:
    """Pascanu et al. 2013, algorithm 1, over all gradients together → these, and the norm before."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    scale = highest / norm if highest and norm > highest else 1.0
    return [g * scale for g in gradients], norm


def running_mean(weights: list[Tensor], start: Tensor, decay: float) -> Tensor:
    """m ← d m + (1 − d) w with d = min(decay, n / (n + 9)) at update n, counted from 1."""
    mean = start.double()
    for n, weight in enumerate(weights, 1):
        d = min(decay, n / (n + 9))
        mean = d * mean + (1 - d) * weight.double()
    return mean
