"""Laws of the pool, with workers that are threads of the test: results, retries, replacements and reloads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from seq2seq.serving.interface import WorkerLost
from seq2seq.serving.pool import Pending, Pool
from seq2seq.serving.scheduler import Scheduler
from seq2seq.serving.workers import ModelSpec, WorkerDiedError


class FakeWorker:
    """Answers a sentence with itself in capitals; dies of the sentences in `deadly`, as often as it says."""

    alive = True

    def __init__(self, deadly: dict[str, int]) -> None:
        self.deadly, self.loaded, self.starts = deadly, list[str](), 0

    def start(self, specs: Sequence[ModelSpec]) -> list[str]:
        self.starts += 1
        return [spec.name for spec in specs]

    def load(self, spec: ModelSpec) -> str:
        time.sleep(0.01)
        self.loaded.append(spec.name)
        return spec.name

    def work(self, task: Any, items: Sequence[str], on_partial: Callable[[int, str], None]) -> tuple[list[str], int]:
        for i, item in enumerate(items):
            on_partial(i, item[:1])
            if self.deadly.get(item, 0):
                self.deadly[item] -= 1
                raise WorkerDiedError
        time.sleep(0.002)
        return [item.upper() for item in items], len(self.loaded)

    def close(self) -> None: ...
    def kill(self) -> None: ...


async def pool_of(count: int, deadly: dict[str, int], sentences: int = 3) -> tuple[Pool, list[FakeWorker]]:
    workers = [FakeWorker(deadly) for _ in range(count)]
    pool = Pool(workers, Scheduler(10**6, 0.001, 10**6, sentences))  # type: ignore[arg-type]
    await pool.start([ModelSpec("a", ("a",))])
    return pool, workers


def requests(pool: Pool, texts: Sequence[Sequence[str]]) -> list[Pending]:
    submitted = [Pending("key", part, part) for part in texts]
    for request in submitted:
        pool.submit(request)
    return submitted


def test_each_result_reaches_its_sentence() -> None:
    async def run() -> None:
        pool, _ = await pool_of(2, {})
        texts = [[f"r{i}s{j}" for j in range(i)] for i in range(9)]
        grown: list[tuple[int, str]] = []
        watched = Pending("key", ["one", "two"], ["one", "two"], on_partial=lambda *each: grown.append(each))
        pool.submit(watched)
        submitted = requests(pool, texts)
        await asyncio.gather(watched.done, *(request.done for request in submitted))
        found = [[result for result, _ in request.results] for request in submitted]
        assert found == [[text.upper() for text in part] for part in texts]
        assert sorted(grown) == [(0, "o"), (1, "t")]
        stats = pool.stats()
        assert (stats.sentences, stats.running_sentences, stats.queued_sentences) == (38, 0, 0)
        assert sum(stats.batch_sizes.counts) == stats.batches and stats.batch_sizes.total == 38
        await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_lost_batch_is_repeated_once(workers: int, deaths: int) -> None:
    """One that costs a second worker is given up, and no other; every worker is replaced."""

    async def run() -> None:
        pool, fakes = await pool_of(workers, {"deadly": deaths}, sentences=1)
        lost, other = requests(pool, [["deadly"], ["fine", "too"]])
        await asyncio.wait([lost.done, other.done])
        if deaths == 1:
            assert lost.results == [("DEADLY", 0)]
        else:
            assert isinstance(lost.done.exception(), WorkerLost)
        assert [result for result, _ in other.results] == ["FINE", "TOO"]
        while len(pool.idle) < workers:
            await asyncio.sleep(0.001)
        assert sum(fake.starts for fake in fakes) == workers + deaths == workers + pool.stats().restarts
        await pool.close()

    asyncio.run(run())


def test_every_worker_loads_between_batches() -> None:
    """No request is dropped meanwhile, and a worker that is busy loads when its batch is answered."""

    async def run() -> None:
        pool, fakes = await pool_of(2, {})
        submitted = requests(pool, [[f"{i}"] * 4 for i in range(30)])
        await pool.load(ModelSpec("new", ("a",)))
        assert [fake.loaded for fake in fakes] == [["new"], ["new"]]
        await asyncio.gather(*(request.done for request in submitted))
        assert {id(worker) for worker in pool.idle} == {id(fake) for fake in fakes}
        await pool.close()

    asyncio.run(run())


def test_nobody_waits_for_a_request_that_was_given_up() -> None:
    async def run() -> None:
        pool, _ = await pool_of(1, {})
        gone, other = requests(pool, [["a", "b"], ["c"]])
        gone.done.cancel()
        await other.done
        assert other.results == [("C", 0)] and gone.results == [None, None]
        await pool.close()

    asyncio.run(run())
