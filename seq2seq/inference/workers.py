"""Worker processes with one core each: on a CPU faster than threads within every small matrix product."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from seq2seq.utils.device import usable_cores
from seq2seq.utils.errors import UserError


def choose_processes(count: int | str, device: torch.device) -> int:
    """Return the number of processes; "auto" is the number of usable cores on a Linux CPU, and 1 elsewhere."""
    possible = device.type == "cpu" and sys.platform == "linux"
    if count == "auto":
        return usable_cores() if possible else 1
    if int(count) > 1 and not possible:
        raise UserError(f"processes: {count} run in parallel only on Linux with device=cpu; use auto or 1", code=2)
    return int(count)


class Workers:
    """Forks of this process, created on demand; they share its memory, such as weights."""

    def __init__(self, work: Callable[..., Any], count: int) -> None:
        self.work, self.count = work, count
        self.pipes: list[Connection] = []
        self.lock = threading.Lock()

    def map(self, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the result for each of at most `count` parts; re-raise a worker's exception."""
        results: list[Any] = []
        with self.lock:
            try:
                while len(self.pipes) < len(requests):
                    self.pipes.append(self._fork())
                for pipe, request in zip(self.pipes, requests, strict=False):
                    pipe.send(request)
                results += (pipe.recv() for pipe in self.pipes[: len(requests)])
            except (EOFError, OSError):
                raise UserError(
                    "a worker process died or failed to start (out of memory?); processes=1 uses less memory"
                ) from None
            finally:
                if len(results) < len(requests):
                    self.close()  # a late result must not answer a later request
        for failed in (result for result in results if isinstance(result, Exception)):
            raise failed
        return results

    def close(self) -> None:
        """Close the pipes; each worker exits when its pipe closes."""
        while self.pipes:
            self.pipes.pop().close()

    def _fork(self) -> Connection:
        context = multiprocessing.get_context("fork")
        parent_end, child_end = context.Pipe()
        process = context.Process(target=self._serve, args=(child_end, [*self.pipes, parent_end]), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about this process's threads, which no worker needs
            process.start()
        child_end.close()
        return parent_end

    def _serve(self, pipe: Connection, other_pipes: Sequence[Connection]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the parent handles Ctrl-C
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in other_pipes:
            other.close()
        torch.set_num_threads(1)
        with suppress(EOFError, OSError):  # the parent closed the pipe
            while True:
                request = pipe.recv()
                try:
                    pipe.send(self.work(*request))
                except Exception as error:
                    pipe.send(error)
