"""Worker processes with one core each: on a CPU faster than threads within every small matrix product."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from seq2seq.utils.device import usable_cores
from seq2seq.utils.errors import UserError

OnResult = Callable[[int], None]  # the index of a request


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

    def map(self, requests: Sequence[tuple[Any, ...]], on_result: OnResult = lambda _: None) -> list[Any]:
        """Give each request to the next idle process; return the results in order, or re-raise a worker's exception.

        One process, or one request, needs no fork. `on_result` receives the index of each request that is done.
        """
        if self.count == 1 or len(requests) == 1:
            return [self._work_alone(i, request, on_result) for i, request in enumerate(requests)]
        with self.lock:
            try:
                results = self._results(requests, on_result)
            except (EOFError, OSError):
                raise UserError(
                    "a worker process died or failed to start (out of memory?); processes=1 uses less memory"
                ) from None
        for failed in (result for result in results if isinstance(result, Exception)):
            raise failed
        return results

    def _work_alone(self, i: int, request: tuple[Any, ...], on_result: OnResult) -> Any:
        result = self.work(*request)
        on_result(i)
        return result

    def _results(self, requests: Sequence[tuple[Any, ...]], on_result: OnResult) -> list[Any]:
        """Return results and exceptions in order; after an exception no further request is begun."""
        results: list[Any] = [None] * len(requests)
        waiting: Iterator[tuple[int, tuple[Any, ...]]] = iter(enumerate(requests))
        busy: dict[Connection, int] = {}
        try:
            while len(self.pipes) < min(self.count, len(requests)):
                self.pipes.append(self._fork())
            self._send(self.pipes, waiting, busy)
            while busy:
                ready = [pipe for pipe in wait(list(busy)) if isinstance(pipe, Connection)]
                for pipe in ready:
                    i, result = busy[pipe], pipe.recv()
                    results[i] = result
                    del busy[pipe]
                    if isinstance(result, Exception):
                        waiting = iter(())
                    else:
                        on_result(i)
                self._send(ready, waiting, busy)
        finally:
            if busy:
                self.close()  # a late result must not answer a later request
        return results

    def _send(
        self, idle: Sequence[Connection], waiting: Iterator[tuple[int, tuple[Any, ...]]], busy: dict[Connection, int]
    ) -> None:
        for pipe, (i, request) in zip(idle, waiting, strict=False):
            busy[pipe] = i
            pipe.send(request)

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
