"""Weights, gradients and moments of which each process holds a part, by torch's `fully_shard` (FSDP2).

torch gathers the weights of a layer for its passes only, and sums the gradients of each part in its process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.config.schema import TrainingConfig
from seq2seq.data.encoding import Batch
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.distributed import ProcessGroup
from seq2seq.training.mixed_precision import WorkingCopy
from seq2seq.training.passes import Passes
from seq2seq.utils.errors import UserError


@dataclass(frozen=True)
class ShardedProcesses(ProcessGroup):
    """Processes that each hold a part of every weight: tensors of the model and the optimizer are torch's DTensors."""

    @property
    def shards_weights(self) -> bool:
        return True

    def reduce(self, parameters: list[nn.Parameter], totals: Tensor) -> list[Tensor]:
        self.all_reduce(totals)
        gradients = [self.own_part(p.grad) for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.world_size)  # torch has averaged them
        return gradients

    def all_norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norm of each whole gradient, given those of its parts."""
        return self.sum_of_parts(torch.stack(list(norms)).square()).sqrt()

    def own_part(self, tensor: Tensor) -> Tensor:
        local: Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        return local

    def whole(self, tensor: Tensor) -> Tensor:
        if not is_sharded(tensor):
            return tensor
        gathered = gather(tensor)
        return gathered.cpu() if self.is_main else gathered.new_empty(0)  # one at a time in the memory of a GPU

    def part_like(self, whole: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or whole.shape != like.shape:  # the number of steps of an optimizer
            return whole
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)

    def sum_of_parts(self, values: Tensor) -> Tensor:
        self.all_reduce(values)
        return values


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")


def gather(tensor: Tensor) -> Tensor:
    """Return all numbers of a sharded tensor to every process."""
    whole: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole


def shard_weights(model: Seq2Seq, precision: torch.dtype) -> None:
    """Leave each process its part of the weights, in float32; each layer gathers its own, in `precision`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if next(model.parameters()).device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise UserError(
            f"training.parallel: fsdp on a CPU needs a newer torch than {torch.__version__}; set training.parallel=ddp"
        )
    # Keys and values are views, and nothing writes to them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    for name, layer in [*model.named_modules()]:
        if name.rpartition(".")[0] in ("encoder.layers", "decoder.layers"):
            if hasattr(layer, "cross_attention"):  # projects the source before the layer runs
                fully_shard(layer.cross_attention, mp_policy=policy)
                register_fsdp_forward_method(layer.cross_attention, "project")
            fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)  # the loss reads the output table


class ShardedWeights(WorkingCopy):
    """The sharded model itself, and a whole model in memory of the CPU for the time of a search."""

    def __init__(self, master: Seq2Seq, replica: Seq2Seq, precision: torch.dtype) -> None:
        super().__init__(master, torch.float32)  # torch converts the weights that it gathers
        self.replica = replica.to("cpu", precision)

    @contextmanager
    @torch.no_grad()
    def with_weights(self, weights: dict[str, Tensor] | None) -> Iterator[Seq2Seq]:
        """Yield a whole model with the given weights, or with the current ones."""
        weights = weights or dict(self.model.named_parameters())
        try:
            model = self.replica.to(next(self.model.parameters()).device)
            for name, p in model.named_parameters():
                p.copy_(gather(weights[name]))
            yield model
        finally:
            self.replica.to("cpu")


class ShardedPasses(Passes):
    """Passes whose last one of an update sums the gradients of all processes, those of a layer at a time."""

    def run(self, model: Seq2Seq, batch: Batch, settings: TrainingConfig, last: bool) -> Tensor:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return super().run(model, batch, settings, last)
