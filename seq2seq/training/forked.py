"""Processes of one thread each, forked from this one: on a CPU faster than threads, above all on a busy machine.

A thread waits for the others in every small product; a process waits for the others three times an update. Weights and
gradients lie in memory that all processes share: each process computes the gradients of its rows, and then sums,
clips and applies those of its own parameters only.

Shapes: N processes, K parameters, P numbers in all parameters together.
"""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from seq2seq.training.distributed import ProcessGroup
from seq2seq.utils.device import memory_of
from seq2seq.utils.errors import UserError

if TYPE_CHECKING:  # Windows has no such class
    from multiprocessing.context import ForkProcess

T = TypeVar("T")
MEMORY_INTERVAL = 10  # seconds between two measurements of memory
POLL = 0.2  # seconds between two checks that the others live
CHUNK = 2**20  # bytes of a value that are exchanged at once
HEADER = struct.Struct("q")
TRACEBACK_LENGTH = 2**16  # characters, which fit into a box
FAILED = 1  # exit code of a fork that leaves an error


def shared_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor whose memory later forks share; it has no name that a killed process could leave behind."""
    count = max(1, torch.Size(shape).numel())
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)[: torch.Size(shape).numel()].view(shape)


class Shards:
    """Weights and gradients in shared memory, and the parameters that each process updates: whole ones, evenly."""

    def __init__(self, master: nn.Module, working: nn.Module, count: int) -> None:
        shares = divide_parameters(dict(master.named_parameters()), count)
        self.names = [name for share in shares for name in share]
        self.parameters = [master.get_parameter(name) for name in self.names]
        sizes = [p.numel() for p in self.parameters]
        self.ends = [0, *accumulate(sizes)]
        bounds = [0, *accumulate(map(len, shares))]
        self.owned = [range(start, end) for start, end in pairwise(bounds)]  # by process, of K
        self.gradients_NP = shared_zeros(count, sum(sizes))
        self.sums_P = shared_zeros(sum(sizes))
        self.sums = self.views(self.sums_P)
        self.present_NK = shared_zeros(count, len(sizes), dtype=torch.uint8)
        self.present: list[bool] = []  # whether any process has a gradient, by parameter
        self.norms_K = shared_zeros(len(sizes))
        self.totals_N3 = shared_zeros(count, 3)
        for model in (master, working) if working is not master else (master,):
            self._share([model.get_parameter(name) for name in self.names])

    def views(self, flat_P: Tensor) -> list[Tensor]:
        """Return each parameter's part of P numbers, in its shape."""
        parts = zip(pairwise(self.ends), self.parameters, strict=True)
        return [flat_P[start:end].view_as(p) for (start, end), p in parts]

    def _share(self, parameters: Sequence[nn.Parameter]) -> None:
        shared = self.views(shared_zeros(self.ends[-1], dtype=parameters[0].dtype))
        for p, view in zip(parameters, shared, strict=True):
            view.copy_(p.detach())
            p.data = view

    def sum_gradients(self, rank: int) -> None:
        """Sum the gradients of a process's own parameters over all processes; the others get none."""
        own = slice(self.ends[self.owned[rank].start], self.ends[self.owned[rank].stop])
        torch.sum(self.gradients_NP[:, own], 0, out=self.sums_P[own])
        self.present = self.present_NK.any(0).tolist()
        self.assign_gradients(self.owned[rank])

    def assign_gradients(self, selected: range) -> None:
        """Give the selected parameters their summed gradients, where any process has one."""
        for i, p in enumerate(self.parameters):
            p.grad = self.sums[i] if self.present[i] and i in selected else None


def divide_parameters(parameters: dict[str, nn.Parameter], count: int) -> list[list[str]]:
    """Divide parameters into as many lists, the largest parameters first, each to the list with the fewest numbers."""
    shares: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name, p in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        lightest = filled.index(min(filled))
        shares[lightest].append(name)
        filled[lightest] += p.numel()
    return shares


class Channel:
    """Waiting for the other processes, and values from them; a dead process holds nothing that another waits for."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("fork")
        self.arrivals = [[context.Semaphore(0) for _ in range(size)] for _ in range((size - 1).bit_length())]
        self.boxes = [mmap.mmap(-1, HEADER.size + CHUNK) for _ in range(size)]
        self.check: Callable[[], None] = lambda: None  # raises an error when another process has died
        self.members = [os.getpid()]
        self.peak, self.measured = 0, -math.inf

    def barrier(self, rank: int) -> None:
        """Wait for all: in round k for the process 2^k before this one (Hensgen et al. 1988)."""
        for k, semaphores in enumerate(self.arrivals):
            semaphores[(rank + 2**k) % len(semaphores)].release()
            while not semaphores[rank].acquire(timeout=POLL):
                self.check()

    def gather(self, rank: int, value: Any, readers: Sequence[int]) -> list[Any]:
        """Return the value of each process to the readers, and nothing to the others."""
        data = memoryview(pickle.dumps(value))
        received, more = [bytearray() for _ in self.boxes], True
        while more:
            self.post(rank, data)
            data = data[CHUNK:]
            self.barrier(rank)
            more = any(HEADER.unpack_from(box)[0] > CHUNK for box in self.boxes)
            for sender in range(len(self.boxes)) if rank in readers else ():
                received[sender] += self.read(sender)
            self.barrier(rank)
        return [pickle.loads(values) for values in received] if rank in readers else []

    def peak_memory(self) -> int:
        """Return the most memory that all processes together were seen to hold: tens of milliseconds to measure."""
        if time.monotonic() - self.measured > MEMORY_INTERVAL:
            self.peak, self.measured = max(self.peak, memory_of(self.members)), time.monotonic()
        return self.peak

    def post(self, rank: int, data: bytes | memoryview) -> None:
        """Write the length of what remains to be sent, and as much of it as a box holds."""
        box = self.boxes[rank]
        HEADER.pack_into(box, 0, len(data))
        box[HEADER.size : HEADER.size + len(data[:CHUNK])] = data[:CHUNK]

    def read(self, rank: int) -> bytes:
        box = self.boxes[rank]
        return box[HEADER.size : HEADER.size + min(CHUNK, HEADER.unpack_from(box)[0])]


@dataclass(frozen=True, kw_only=True)
class ForkedProcesses(ProcessGroup):
    """Forks of one process, which share the weights of its model."""

    channel: Channel
    shards: Shards

    @property
    def shares_weights(self) -> bool:
        return True

    def all_gather(self, value: Any) -> list[Any]:
        return self.channel.gather(self.rank, value, range(self.world_size))

    def gather(self, value: Any) -> list[Any]:
        return self.channel.gather(self.rank, value, [0])

    def barrier(self) -> None:
        self.channel.barrier(self.rank)

    def wait_for_weights(self) -> None:
        self.barrier()

    def peak_memory(self, device: torch.device) -> int:
        return self.channel.peak_memory()

    def own_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return self.owned

    @cached_property
    def owned(self) -> list[nn.Parameter]:
        """The parameters that this process updates."""
        return [self.shards.parameters[i] for i in self.shards.owned[self.rank]]

    @cached_property
    def gradient_buffers(self) -> dict[nn.Parameter, Tensor]:
        """Where this process leaves the gradients of its rows."""
        return dict(zip(self.shards.parameters, self.shards.views(self.shards.gradients_NP[self.rank]), strict=True))

    def reduce(self, parameters: list[nn.Parameter], totals: Tensor) -> list[Tensor]:
        """Sum `totals` and the gradients of this process's own parameters over all processes."""
        shards = self.shards
        for p, buffer in self.gradient_buffers.items():
            if p.grad is None:
                buffer.zero_()
            elif p.grad.data_ptr() != buffer.data_ptr():
                buffer.copy_(p.grad)
        shards.present_NK[self.rank] = torch.tensor([p.grad is not None for p in shards.parameters])
        shards.totals_N3[self.rank] = totals
        self.barrier()
        totals.copy_(shards.totals_N3.sum(0))
        shards.sum_gradients(self.rank)
        return [p.grad for p in self.owned if p.grad is not None]

    def all_norms(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norm of every parameter's gradient, given those of the gradients that `reduce` returned."""
        owned, norms_K = self.shards.owned[self.rank], self.shards.norms_K
        present = [i for i in owned if self.shards.parameters[i].grad is not None]
        norms_K[owned.start : owned.stop] = 0.0
        if present:
            norms_K[present] = torch.stack(list(norms))
        self.barrier()
        return norms_K

    def finish_update(self) -> None:
        """Wait until every process has updated its parameters; from then on, show all gradients, for the log."""
        self.barrier()
        self.shards.assign_gradients(range(len(self.shards.parameters)))


def run_forked(size: int, shards: Shards, work: Callable[[ForkedProcesses], T]) -> T:
    """Run `work` in this process and in forks of it, with one thread each, and return its result in this process."""
    channel, threads = Channel(size), torch.get_num_threads()
    children: list[ForkProcess] = []
    torch.set_num_threads(1)  # a fork cannot use a pool of threads that this process has started
    gc.freeze()  # the collector would copy the pages of every object that is shared
    try:
        for rank in range(1, size):
            children.append(
                _fork(_serve, ForkedProcesses(rank, size, channel=channel, shards=shards), work, os.getpid())
            )
        channel.check = lambda: _raise_error(channel, children)
        channel.members += [child.pid for child in children if child.pid]
        result = work(ForkedProcesses(0, size, channel=channel, shards=shards))
        for child in children:
            child.join()
        channel.check()
        return result
    finally:
        for child in children:
            child.kill()
            child.join()
        gc.unfreeze()
        torch.set_num_threads(threads)


def _fork(*work: Any) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=work[0], args=work[1:], daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about this process's threads, which no fork needs
        process.start()
    return process


def _serve(processes: ForkedProcesses, work: Callable[[ForkedProcesses], Any], parent: int) -> None:
    """Run `work` in a fork, and leave its error for the first process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one stops the others
    _end_with(parent)
    processes.channel.check = lambda: _end_with(parent)
    try:
        work(processes)
    except BaseException as error:
        processes.channel.post(processes.rank, _pickled(error))
        raise SystemExit(FAILED) from None


def _end_with(parent: int) -> None:
    """End this process when its parent ends, however that happens."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(FAILED)


def _pickled(error: BaseException) -> bytes:
    """Return an error with its traceback as text, or the text alone where the error cannot be sent."""
    text = "".join(traceback.format_exception(error))[-TRACEBACK_LENGTH:]
    try:
        data = pickle.dumps((error, text))
        pickle.loads(data)
    except Exception:
        data = b""
    return data if 0 < len(data) <= CHUNK else pickle.dumps((RuntimeError(text), text))


def _error_left(data: bytes) -> tuple[BaseException, str] | None:
    """Return the error in a box, or None where its process ended without leaving one."""
    try:
        error, text = pickle.loads(data)
    except Exception:  # of an empty box, or of a value that was exchanged before
        return None
    return (error, text) if isinstance(error, BaseException) else None


def _raise_error(channel: Channel, children: Sequence[ForkProcess]) -> None:
    """Raise the error of a process that has ended with one."""
    for rank, child in enumerate(children, 1):
        if child.exitcode == FAILED and (left := _error_left(channel.read(rank))):
            error, text = left
            raise error from (None if isinstance(error, UserError) else RuntimeError(text))
        if child.exitcode:
            name = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"exit code {child.exitcode}"
            raise UserError(
                f"process {rank + 1} of {len(children) + 1} was killed ({name}); the last checkpoint is intact: repeat "
                "the command to continue, with processes=1 if memory has run out"
            )
