"""Averaged weights: kept, evaluated and saved beside the live ones, never instead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from seq2seq.config.schema import TrainConfig
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.distributed import SINGLE_PROCESS, ProcessGroup
from seq2seq.training.optimizers import Optimizers, ScheduleFree

Weights = dict[str, Tensor]


class Average(Protocol):
    live: dict[str, nn.Parameter]

    def update(self, update: int) -> None:
        """Account for an update of the live weights, given its number."""

    def weights(self) -> Weights:
        """Return the current averages by parameter name."""

    def load(self, weights: Weights) -> None:
        """Continue from the averages of a checkpoint."""

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average only these parameters, as other processes average the rest."""
        kept = set(parameters)
        self.live = {name: p for name, p in self.live.items() if p in kept}


class ExponentialMovingAverage(Average):
    """An exponential moving average that forgets the first, poorly trained weights faster."""

    def __init__(self, model: Seq2Seq, decay: float) -> None:
        self.live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, update: int) -> None:
        decay = min(self.decay, update / (update + 9))
        if self.live:
            torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    def weights(self) -> Weights:
        return self.mean

    def load(self, weights: Weights) -> None:
        for name, mean in self.mean.items():
            mean.copy_(weights[name])

    def keep(self, parameters: Iterable[nn.Parameter]) -> None:
        super().keep(parameters)
        self.mean = {name: self.mean[name] for name in self.live}


class CheckpointAverage(Average):
    """The mean of the live weights and the checkpoints of earlier validations (Vaswani et al. 2017, §6.1)."""

    def __init__(
        self, model: Seq2Seq, recent_weights: Callable[[], list[Path]], processes: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.live, self.recent_weights = dict(model.named_parameters()), recent_weights
        self.processes = processes

    def update(self, update: int) -> None: ...

    @torch.no_grad()
    def weights(self) -> Weights:
        mean = {name: p.detach().clone() for name, p in self.live.items()}
        files = self.recent_weights()
        for file in files:
            weights = load_file(file)
            for name in mean:
                mean[name] += self.processes.part_like(weights[name].to(mean[name].device), mean[name])
        return {name: weight / (1 + len(files)) for name, weight in mean.items()}

    def load(self, weights: Weights) -> None: ...


class ScheduleFreeAverage(Average):
    """The average that schedule-free AdamW maintains."""

    def __init__(self, model: Seq2Seq, optimizer: ScheduleFree) -> None:
        self.live, self.optimizer = dict(model.named_parameters()), optimizer

    def update(self, update: int) -> None: ...

    def weights(self) -> Weights:
        return {name: self.optimizer.average(p) for name, p in self.live.items()}

    def load(self, weights: Weights) -> None: ...


def build_average(
    config: TrainConfig,
    model: Seq2Seq,
    optimizers: Optimizers,
    recent_weights: Callable[[], list[Path]],
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Average | None:
    """Build the average that a config selects; `recent_weights` lists the weight files of the last validations."""
    if isinstance(optimizers.optimizers[0], ScheduleFree):
        return ScheduleFreeAverage(model, optimizers.optimizers[0])
    if config.training.average == "ema":
        return ExponentialMovingAverage(model, config.training.ema_decay)
    if config.training.average == "last":
        return CheckpointAverage(model, recent_weights, processes)
    return None
