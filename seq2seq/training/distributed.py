"""Data-parallel training: the rank of this process, and sums over all processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seq2seq.utils.device import peak_memory
from seq2seq.utils.errors import UserError, reason_of

TIMEOUT = timedelta(minutes=30)  # the longest wait for a rank that tokenises or validates


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run; no overhead for a single one."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that logs and writes."""
        return self.rank == 0

    @property
    def shares_weights(self) -> bool:
        """Whether weights lie in memory that all processes share, each updating a part of them."""
        return False

    @property
    def batches(self) -> int:
        """The number of batches that the processes train on at a time."""
        return 1 if self.shares_weights else self.world_size

    def peak_memory(self, device: torch.device) -> int:
        """Return the peak memory in bytes of this process, and of the forks that train with it."""
        return peak_memory(device)

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that this process updates."""
        return list(model.parameters())

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of every weight."""
        return False

    def reduce(self, parameters: list[nn.Parameter], totals: Tensor) -> list[Tensor]:
        """Sum `totals` over the processes; return the gradients that this process steps with, summed already."""
        self.all_reduce(totals)
        return [p.grad for p in parameters if p.grad is not None]

    def all_norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norm of every gradient, given those of the gradients that `reduce` returned."""
        return torch.stack(list(norms))

    def finish_update(self) -> None:
        """Wait until every process has updated its part of shared weights."""

    def wait_for_weights(self) -> None:
        """Wait until every process has written its part of shared weights, or has read them."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def own_part(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a weight or gradient that this process holds."""
        return tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """Return all numbers of a weight or moment to the main process."""
        return tensor

    def part_like(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the part of a whole weight or moment that this process holds of `like`."""
        return whole

    def sum_of_parts(self, values: Tensor) -> Tensor:
        """Sum values that each process has computed from the numbers that it holds."""
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Collect the value of each process, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Collect the values for the main process, whose own is not sent; the others get nothing."""
        values = self.all_gather(None if self.is_main else value)
        return [value, *values[1:]] if self.is_main else []

    def barrier(self) -> None:
        if self.world_size > 1:
            self.all_gather(None)


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def join_processes(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started, or run alone."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun keeps one store through all restarts; a prefix hides the addresses of dead processes.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT
    )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # objects over gloo, gradients of GPUs over nccl
        store=dist.PrefixStore(  # type: ignore[attr-defined]
            f"seq2seq-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
        ),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
    )
    try:
        yield ProcessGroup(rank, world_size)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("Connection", "gloo", "NCCL", "Socket", "timed out")):
            raise
        raise UserError(
            f"process {rank} of {world_size} lost the connection to another process ({reason_of(error)}); "
            "the last checkpoint is intact"
        ) from None
    finally:
        dist.destroy_process_group()
