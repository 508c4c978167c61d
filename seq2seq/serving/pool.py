"""The worker processes of a service: batches go to idle ones, and one that dies is replaced."""

from __future__ import annotations

import asyncio
import logging
import math
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, NamedTuple

from seq2seq.inference.translator import Translation
from seq2seq.serving.interface import Histogram, Stats, WorkerLost
from seq2seq.serving.scheduler import Part, Request, Scheduler
from seq2seq.serving.workers import Loaded, ModelSpec, Worker, WorkerDiedError
from seq2seq.utils.errors import UserError

log = logging.getLogger("seq2seq.serving")

ATTEMPTS = 2  # workers that a batch may cost
RESTART_DELAYS = (0.0, 1.0, 5.0, 30.0)  # seconds before each attempt to replace a worker; the last repeats
FIRST_SPEED = 1000.0  # characters per second of a worker, until it is measured
SMOOTHING = 0.1  # weight of the newest batch in the measured speed


@dataclass(eq=False)
class Pending(Request):
    """A request whose results arrive batch by batch."""

    on_result: Callable[[], None] | None = None
    on_partial: Callable[[int, str], None] | None = None  # index of an item, its text so far
    results: list[Any] = field(init=False)  # with the update of their checkpoint; None until they arrive
    done: asyncio.Future[None] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.results, self.missing = [None] * len(self.items), len(self.items)
        self.done = asyncio.get_running_loop().create_future()
        if not self.items:
            self.done.set_result(None)

    def deliver(self, index: int, result: Any, update: int | None) -> None:
        """Take a result, unless nobody waits for it any more."""
        if self.done.done():
            return
        self.results[index], self.missing = (result, update), self.missing - 1
        if self.on_result:
            self.on_result()
        if not self.missing:
            self.done.set_result(None)

    def grow(self, index: int, text: str) -> None:
        if self.on_partial and not self.done.done():
            self.on_partial(index, text)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Batch(NamedTuple):
    """Sentences that a worker gets together."""

    parts: list[Part]
    attempt: int = 1

    def live(self) -> list[Part]:
        """Return the parts that somebody still waits for."""
        return [part for part in self.parts if not request_of(part).done.done()]


def request_of(part: Part) -> Pending:
    assert isinstance(part.request, Pending)
    return part.request


class Pool:
    """Workers and the queue before them, in one event loop.

    A worker is idle, or borrowed: by a batch, a reload, or its replacement.
    """

    def __init__(self, workers: Sequence[Worker], scheduler: Scheduler, timeout: float = math.inf) -> None:
        self.workers, self.scheduler = workers, scheduler
        self.timeout = timeout  # seconds that a request may take: nobody waits for a batch after them
        self.specs: Sequence[ModelSpec] = ()  # what a new worker loads
        self.idle: list[Worker] = []
        self.waiting: dict[Worker, asyncio.Future[None]] = {}  # who borrows it as soon as it is idle
        self.retries: deque[Batch] = deque()
        self.counters = Counters()
        self.running = 0  # sentences
        self.threads = ThreadPoolExecutor(len(workers), "worker")  # each waits for one worker
        self.tasks: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.closed = False

    # --------------------------------------------------------------------------------- start and end

    async def start(self, specs: Sequence[ModelSpec]) -> list[Loaded]:
        """Start all workers; return what the first of them has loaded."""
        self.specs = specs
        try:
            loaded = await asyncio.gather(*(self._in_thread(worker.start, specs) for worker in self.workers))
        except WorkerDiedError:
            remedy = "processes=1 uses less memory"
            raise UserError(f"a worker process died while it loaded the models (out of memory?); {remedy}") from None
        self.idle += self.workers
        result: list[Loaded] = loaded[0]
        return result

    async def close(self) -> None:
        """End the workers, idle ones gently."""
        self._stop_tasks()
        idle = [worker for worker in self.workers if worker in self.idle]
        self.idle.clear()
        await asyncio.gather(*(self._in_thread(worker.close) for worker in idle))
        self.kill()

    def kill(self) -> None:
        """End all workers at once."""
        self._stop_tasks()
        for worker in self.workers:
            worker.kill()
        self.threads.shutdown(wait=False)

    def _stop_tasks(self) -> None:
        self.closed = True
        for task in self.tasks:
            task.cancel()

    # -------------------------------------------------------------------------------------- batches

    def submit(self, request: Pending) -> None:
        """Queue a request, for which the scheduler must have room."""
        self.scheduler.add(request, self._now())
        self._dispatch()

    def _dispatch(self) -> None:
        """Give batches to idle workers, now and again when the next one is ready."""
        if self.timer:
            self.timer.cancel()
            self.timer = None
        self.replace_dead()
        while self.idle and not self.closed:
            batch = self._next_batch()
            if batch is None:
                break
            self.spawn(self._work(self.idle.pop(), batch))
        ready_at = self.scheduler.ready_at() if self.idle and not self.closed else None
        if ready_at is not None:
            self.timer = asyncio.get_running_loop().call_at(ready_at, self._dispatch)

    def _next_batch(self) -> Batch | None:
        while self.retries:
            batch = self.retries.popleft()
            if batch.live():
                return batch
        parts = self.scheduler.take(self._now(), len(self.idle))
        return Batch(parts) if parts else None

    async def _work(self, worker: Worker, batch: Batch) -> None:
        """Let a worker answer a batch; if it dies, another one tries once more."""
        began = self._now()
        try:
            await self._attempt(worker, batch)
        except WorkerDiedError:
            overdue = self._now() - began >= self.timeout
            reason = "was stopped after timeout_s" if overdue else "died (out of memory?)"
            log.warning("a worker process %s; another one replaces it", reason)
            self._lose(batch)
            await self._replace(worker)
        finally:
            self._release(worker)

    async def _attempt(self, worker: Worker, batch: Batch) -> None:
        """Let a worker answer a batch, and stop it after the timeout; an error is that of a request."""
        parts, began = batch.live(), self._now()
        self.running += len(parts)
        watchdog = asyncio.get_running_loop().call_at(began + self.timeout, worker.stop)
        try:
            await self._answer(worker, parts)
            self.counters.add(parts, self._now() - began)
        except WorkerDiedError:
            raise
        except Exception as error:
            self._fail(parts, error)
        finally:
            watchdog.cancel()
            self.running -= len(parts)

    async def _answer(self, worker: Worker, parts: list[Part]) -> None:
        loop = asyncio.get_running_loop()

        def grow(i: int, text: str) -> None:
            loop.call_soon_threadsafe(request_of(parts[i]).grow, parts[i].index, text)

        items = [part.item for part in parts]
        results, update = await self._in_thread(worker.work, parts[0].request.key, items, grow)
        for part, result in zip(parts, results, strict=True):
            request_of(part).deliver(part.index, result, update)

    def _fail(self, parts: list[Part], error: Exception) -> None:
        """Give an error to the request that caused it: of several, each is repeated by itself."""
        by_request: dict[Pending, list[Part]] = {}
        for part in parts:
            by_request.setdefault(request_of(part), []).append(part)
        if len(by_request) > 1:
            self.retries.extend(map(Batch, by_request.values()))
            return
        for request in by_request:
            request.fail(error)

    def _lose(self, batch: Batch) -> None:
        """Repeat the batch of a dead worker, or give it up."""
        if batch.attempt < ATTEMPTS:
            self.retries.append(Batch(batch.parts, batch.attempt + 1))
            self._dispatch()
            return
        for part in batch.parts:
            request_of(part).fail(WorkerLost("the process that worked on this request died, twice"))

    def replace_dead(self) -> None:
        """Replace the idle workers that have died, before a batch meets them."""
        for worker in [worker for worker in self.idle if not worker.alive and not self.closed]:
            log.warning("an idle worker process died; another one replaces it")
            self.idle.remove(worker)
            self.spawn(self._revive(worker))

    async def _revive(self, worker: Worker) -> None:
        try:
            await self._replace(worker)
        finally:
            self._release(worker)

    async def _replace(self, worker: Worker) -> None:
        """Start a worker again, until it has loaded the models."""
        for delay in chain(RESTART_DELAYS, repeat(RESTART_DELAYS[-1])):
            await asyncio.sleep(delay)
            try:
                await self._in_thread(worker.start, self.specs)
            except Exception as error:  # whatever loading raised, as where other processes fill the GPU's memory
                log.warning("a worker process cannot be started: %s", str(error) or "it died")
                worker.stop()  # without its models it is of no use, but would count as alive
            else:
                self.counters.restarts += 1
                return

    # -------------------------------------------------------------------------------------- reloads

    async def load(self, spec: ModelSpec) -> Loaded:
        """Let one worker after the other load other checkpoints of a model, between two batches."""
        for worker in self.workers:
            async with self._borrowed(worker):
                try:
                    loaded: Loaded = await self._in_thread(worker.load, spec)
                except WorkerDiedError:
                    await self._replace(worker)
                    raise UserError(f"{spec.name}: a worker process died while it loaded this model") from None
        return loaded

    @asynccontextmanager
    async def _borrowed(self, worker: Worker) -> AsyncIterator[None]:
        if worker in self.idle:
            self.idle.remove(worker)
        else:
            self.waiting[worker] = asyncio.get_running_loop().create_future()
            await self.waiting[worker]
        try:
            yield
        finally:
            self._release(worker)

    def _release(self, worker: Worker) -> None:
        waiting = self.waiting.pop(worker, None)
        if waiting and not waiting.done():
            waiting.set_result(None)
        else:
            self.idle.append(worker)
            self._dispatch()

    # ---------------------------------------------------------------------------------------- tools

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task until it ends or the pool is closed."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def seconds_until_room(self) -> float:
        """Estimate how long the queue will take."""
        return self.scheduler.characters / (self.counters.speed * len(self.workers))

    def stats(self) -> Stats:
        queued = self.scheduler.sentences, self.scheduler.characters
        return self.counters.stats(*queued, self.running, sum(worker.alive for worker in self.workers))

    def _in_thread(self, method: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self.threads, method, *arguments)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


class Counters:
    """What the workers have done since the start."""

    def __init__(self) -> None:
        self.batches = self.sentences = self.restarts = self.reloads = 0
        self.source_tokens = self.target_tokens = 0
        self.sizes, self.seconds = Buckets(*(2**i for i in range(11))), Buckets(*(0.01 * 2**i for i in range(12)))
        self.speed = FIRST_SPEED

    def add(self, parts: Sequence[Part], seconds: float) -> None:
        """Count a batch that is answered."""
        self.batches, self.sentences = self.batches + 1, self.sentences + len(parts)
        self.sizes.add(len(parts))
        self.seconds.add(seconds)
        self.speed += SMOOTHING * (sum(len(part.text) for part in parts) / max(seconds, 1e-3) - self.speed)
        for part in parts:
            translation = first_translation(request_of(part).results[part.index])
            if translation is not None:
                self.source_tokens += len(translation.source_pieces)
                # With the end mark; an empty sentence runs no model.
                self.target_tokens += len(translation.pieces) + 1 if translation.source_pieces else 0

    def stats(self, queued_sentences: int, queued_characters: int, running: int, workers: int) -> Stats:
        return Stats(
            queued_sentences=queued_sentences,
            queued_characters=queued_characters,
            running_sentences=running,
            batches=self.batches,
            sentences=self.sentences,
            source_tokens=self.source_tokens,
            target_tokens=self.target_tokens,
            batch_sizes=self.sizes.histogram(),
            batch_seconds=self.seconds.histogram(),
            workers=workers,
            restarts=self.restarts,
            reloads=self.reloads,
        )


def first_translation(answer: tuple[Any, int | None] | None) -> Translation | None:
    """Return the best translation, or the scored one, of a sentence's answer."""
    result = answer[0] if answer else None
    best = result[0] if isinstance(result, list) and result else result
    return best if isinstance(best, Translation) else None


class Buckets:
    """A histogram that grows."""

    def __init__(self, *bounds: float) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def histogram(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)
