"""Worker processes answer in order, are made once, pass on errors and are replaced when they were killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from seq2seq.inference.workers import Workers, choose_processes
from seq2seq.utils.errors import UserError
from tests.helpers.program import forks

CPU = torch.device("cpu")


def work(value: float, wait: float = 0.0) -> tuple[float, int, int]:
    time.sleep(wait)
    if value < 0:
        raise UserError(f"{value} is negative")
    if value == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    return value, os.getpid(), torch.get_num_threads()


@pytest.fixture
def workers() -> Iterator[Workers]:
    torch.set_num_threads(2)  # of this process, which a worker must not inherit
    made = Workers(work, 3)
    yield made
    made.close()


@forks
def test_results_are_in_the_order_of_the_work(workers: Workers) -> None:
    """The slowest first: each chunk has a process of its own with one thread, the same one each time."""
    first = workers.map([(1, 0.05), (2,), (3,)])
    second = workers.map([(4,), (5,), (6,)])
    assert [value for value, _, _ in (*first, *second)] == [1, 2, 3, 4, 5, 6]
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert len({os.getpid(), *(pid for _, pid, _ in first)}) == 4
    assert all(threads == 1 for _, _, threads in first)


@forks
@pytest.mark.parametrize("count", [1, 3])
def test_each_result_is_announced_when_it_arrives(count: int) -> None:
    """Once, by its index, whether or not other processes work; one that failed is not."""
    workers, done = Workers(work, count), list[int]()
    assert [value for value, *_ in workers.map([(i,) for i in range(4)], done.append)] == [0, 1, 2, 3]
    assert sorted(done) == [0, 1, 2, 3]
    done.clear()
    with pytest.raises(UserError):
        workers.map([(1,), (-1,)], done.append)
    assert done in ([0], [])
    workers.close()


@forks
def test_no_more_processes_are_made_than_there_are_chunks(workers: Workers) -> None:
    """Few chunks start few processes; more are started when needed, and the old ones are kept."""
    few = workers.map([(1,), (2,)])
    assert len(workers.pipes) == 2
    many = workers.map([(2,), (3,), (4,)])
    fewer = workers.map([(5,), (6,)])
    assert len(workers.pipes) == 3
    assert few[0][1] == many[0][1] == fewer[0][1]
    assert [value for value, _, _ in fewer] == [5, 6]


@forks
def test_an_error_in_a_worker_is_raised_in_the_parent_and_the_next_work_is_done(workers: Workers) -> None:
    """No late result of one chunk is taken for the result of the next."""
    with pytest.raises(UserError, match="-1 is negative"):
        workers.map([(1,), (-1,), (2,)])
    assert [value for value, _, _ in workers.map([(7,), (8,), (9,)])] == [7, 8, 9]


@forks
def test_a_killed_worker_is_an_error_and_is_replaced(workers: Workers) -> None:
    """Also while another chunk is still being processed, whose result comes too late."""
    with pytest.raises(UserError, match="a worker process died"):
        workers.map([(99,), (1, 0.1), (2,)])
    assert workers.pipes == []
    assert [value for value, _, _ in workers.map([(7,), (8,)])] == [7, 8]


@forks
def test_more_parts_than_processes_go_to_those_that_are_idle(workers: Workers) -> None:
    """In whatever order they end; a slow part holds nobody up."""
    found = workers.map([(0, 0.3), *((i,) for i in range(1, 20))])
    assert [value for value, _, _ in found] == list(range(20))
    assert len({pid for _, pid, _ in found}) == 3
    assert [pid for _, pid, _ in found].count(found[0][1]) == 1, "the one with the slow part had no other"


@forks
def test_after_an_error_no_part_is_begun(workers: Workers) -> None:
    """The parts that run are waited for, so that their processes can be used again."""
    with pytest.raises(UserError, match="-1 is negative"):
        workers.map([(-1,), (1, 0.2), (2, 0.2), *((99,) for _ in range(9))])
    assert len(workers.pipes) == 3
    assert [value for value, _, _ in workers.map([(7,), (8,), (9,)])] == [7, 8, 9]


def test_one_process_works_without_a_fork() -> None:
    """And so does one part, whatever the number of processes."""
    for made, parts in ((Workers(work, 1), [(1,), (2,)]), (Workers(work, 3), [(1,)])):
        assert {pid for _, pid, _ in made.map(parts)} == {os.getpid()} and made.pipes == []


@forks
def test_closed_workers_end_and_can_be_made_again(workers: Workers) -> None:
    """Each process ends when its pipe is closed, in whatever order they were made."""
    pids = {pid for _, pid, _ in workers.map([(1,), (2,), (3,)])}
    processes = [p for p in multiprocessing.active_children() if p.pid in pids]
    workers.close()
    for process in processes:
        process.join(5)
    assert len(processes) == 3 and all(process.exitcode == 0 for process in processes)
    assert workers.map([(4,), (5,)])[0][0] == 4


@forks
def test_an_interrupt_is_not_for_workers_and_a_termination_is(workers: Workers) -> None:
    """Ctrl-C reaches the whole group, and only the process that was started may answer it."""
    (_, pid, _), _ = workers.map([(1,), (2,)])
    os.kill(pid, signal.SIGINT)
    assert workers.map([(2,), (3,)])[0][:2] == (2, pid)
    (process,) = (p for p in multiprocessing.active_children() if p.pid == pid)
    process.terminate()
    process.join(5)
    assert process.exitcode == -signal.SIGTERM


def test_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default as many as threads on a Linux CPU, otherwise one; a given number is used if it is possible."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    counts: dict[str, Any] = {"linux": 7, "darwin": 1, "win32": 1}
    for platform, count in counts.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert choose_processes("auto", CPU) == count
        assert choose_processes("auto", torch.device("cuda")) == 1
        assert choose_processes(1, CPU) == choose_processes("1", torch.device("cuda")) == 1
        if platform == "linux":
            assert choose_processes(2, CPU) == 2 and choose_processes("3", CPU) == 3
        for device in [torch.device("cuda"), *([CPU] if platform != "linux" else [])]:
            with pytest.raises(UserError, match="processes: 2 "):
                choose_processes(2, device)
