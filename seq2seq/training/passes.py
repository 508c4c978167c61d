"""The forward and backward pass of a batch; of several processes, torch sums the gradients while it computes them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from seq2seq.config.schema import TrainingConfig
from seq2seq.data.encoding import Batch
from seq2seq.model.interface import Seq2Seq
from seq2seq.training.loss import training_loss
from seq2seq.training.mixed_precision import WorkingCopy


class Passes:
    """The passes of a single process, or of one that sums its gradients later."""

    def __init__(self, working: WorkingCopy) -> None:
        self.working = working

    def run(self, model: Seq2Seq, batch: Batch, settings: TrainingConfig, last: bool) -> Tensor:
        """Add the gradients of a batch, perhaps an update's last one, to the master's; return the plain loss."""
        objective, plain = training_loss(model, batch, settings)
        objective.backward()
        self.working.transfer_gradients()
        return plain


class ReducedPasses(Passes):
    """Passes whose last one of an update sums the gradients of all processes, each as soon as it is known."""

    def run(self, model: Seq2Seq, batch: Batch, settings: TrainingConfig, last: bool) -> Tensor:
        self.objective.model = model
        with nullcontext() if last else self.reducer.no_sync():
            objective, plain = self.reducer(batch, settings)
            objective.backward()
        if last:
            self.working.drop_gradients()
        else:
            self.working.transfer_gradients()
        return plain

    @cached_property
    def objective(self) -> Objective:
        return Objective(self.working.model)

    @cached_property
    def reducer(self) -> DistributedDataParallel:
        """Made at the first update, when all processes have a model."""
        # The loss reads the output table outside the model: torch must see the loss to know which gradients will come.
        # Looking for absent ones also keeps torch from reordering its buckets after the first update of a process, so
        # that a resumed run sums in the order of an uninterrupted one.
        reducer = DistributedDataParallel(self.objective, find_unused_parameters=True, gradient_as_bucket_view=True)
        # A lambda, as torch refuses annotations that are strings.
        reducer.register_comm_hook(self.working, lambda working, bucket: sum_over_processes(working, bucket))
        return reducer


class Objective(nn.Module):
    """The training loss as a module."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        self.absent = nn.Parameter(torch.zeros(1, device=device))  # else torch warns that none was unused

    def forward(self, batch: Batch, settings: TrainingConfig) -> tuple[Tensor, Tensor]:
        return training_loss(self.model, batch, settings)


def sum_over_processes(working: WorkingCopy, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    """Begin to sum a bucket's gradients over the processes: in float32, and not their mean, as torch would."""
    buffer = bucket.buffer()
    sums = working.accumulate(bucket.parameters(), buffer)
    work = dist.all_reduce(sums, async_op=True)

    def finished(future: Future[list[Tensor]]) -> Tensor:
        future.value()  # raises the error of a connection that was lost
        return buffer

    return work.get_future().then(finished)
