"""Processes that work side by side with one core each: on a CPU that is faster than threads in every small product."""

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

from seq2seq.utils.errors import UserError


def choose_processes(count: int | str, device: torch.device) -> int:
    """As many as torch has threads, where a process can be forked and the work is the CPU's; else this one alone."""
    possible = device.type == "cpu" and sys.platform == "linux"
    if count == "auto":
        return torch.get_num_threads() if possible else 1
    if int(count) > 1 and not possible:
        raise UserError(f"processes: {count} work side by side only on Linux and device=cpu; take auto or 1", code=2)
    return int(count)


class Workers:
    """Forks of this process, made when there is work: what it holds in memory, such as weights, they share."""

    def __init__(self, work: Callable[..., Any], count: int) -> None:
        self.work, self.count = work, count
        self.pipes: list[Connection] = []
        self.free = threading.Lock()

    def map(self, shares: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The work's result for each share, at most `count`; what a worker raises is raised here."""
        results: list[Any] = []
        with self.free:
            try:
                while len(self.pipes) < len(shares):
                    self.pipes.append(self._fork())
                for pipe, share in zip(self.pipes, shares, strict=False):
                    pipe.send(share)
                results += (pipe.recv() for pipe in self.pipes[: len(shares)])
            except (EOFError, OSError):
                raise UserError("a worker was killed or not made, perhaps for memory; processes=1 needs less") from None
            finally:
                if len(results) < len(shares):
                    self.close()  # what comes late must not be taken for the answer to something else
        for failed in (result for result in results if isinstance(result, Exception)):
            raise failed
        return results

    def close(self) -> None:
        """Each ends when it finds nobody at the other end."""
        while self.pipes:
            self.pipes.pop().close()

    def _fork(self) -> Connection:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=self._serve, args=(there, [*self.pipes, here]), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of this process's threads: no worker needs them
            process.start()
        there.close()
        return here

    def _serve(self, pipe: Connection, of_others: Sequence[Connection]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that was started
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in of_others:
            other.close()
        torch.set_num_threads(1)
        with suppress(EOFError, OSError):  # the other end is gone
            while True:
                share = pipe.recv()
                try:
                    pipe.send(self.work(*share))
                except Exception as error:
                    pipe.send(error)
