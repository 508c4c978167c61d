"""Laws of pool and service, with workers that are threads of the test: results, retries, replacements, reloads."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from seq2seq.inference.translator import EMPTY, Translation
from seq2seq.serving import service as service_module
from seq2seq.serving import workers as workers_module
from seq2seq.serving.interface import Closing, Partial, WorkerLost
from seq2seq.serving.pool import Counters, Pending, Pool
from seq2seq.serving.scheduler import Part, Scheduler
from seq2seq.serving.service import Service
from seq2seq.serving.workers import Loaded, Models, ModelSpec, Task, Version, Worker, WorkerDiedError
from seq2seq.utils.errors import UserError
from tests.helpers.serving import model_info, serve_config

NEW: Version = (("new", 1),)


class FakeWorker:
    """Answers a sentence with itself in capitals; dies of the sentences in `deadly`, as often as it says.

    "wrong" is an error of its batch, and "endless" takes until the worker is stopped.
    """

    steps = 1  # of the search
    load_seconds = 0.01
    failures: tuple[Exception, ...] = ()  # of the first restarts

    def __init__(self, deadly: dict[str, int]) -> None:
        self.deadly, self.loaded, self.starts = deadly, list[str](), 0
        self.alive, self.alive_at_start = False, list[bool]()
        self.stopped, self.busy = threading.Event(), threading.Lock()

    def start(self, specs: Sequence[ModelSpec]) -> list[str]:
        self.alive_at_start.append(self.alive)
        self.starts, self.alive = self.starts + 1, True
        if 1 < self.starts <= len(self.failures) + 1:
            raise self.failures[self.starts - 2]
        return [spec.name for spec in specs]

    def load(self, spec: ModelSpec) -> Loaded:
        assert self.busy.acquire(blocking=False), "a worker does two things at once"
        time.sleep(self.load_seconds)
        self.loaded.append(spec.name)
        self.busy.release()
        return Loaded(model_info(spec.name, update=len(self.loaded)), NEW, {})

    def work(self, task: Any, items: Sequence[Any], on_partial: Callable[[int, str], None]) -> tuple[list[str], int]:
        items = [item if isinstance(item, str) else item[0] for item in items]  # without its prefix
        assert not self.busy.locked(), "a worker does two things at once"
        if "wrong" in items:
            raise UserError("a wrong sentence")
        if "endless" in items:
            assert self.stopped.wait(1)
            raise WorkerDiedError
        for i, item in enumerate(items):
            for length in range(self.steps):
                on_partial(i, item[: length + 1])
            if self.deadly.get(item, 0):
                self.deadly[item] -= 1
                raise WorkerDiedError
        time.sleep(0.002)
        return [item.upper() for item in items], len(self.loaded)

    def stop(self) -> None:
        self.alive = False
        self.stopped.set()

    def close(self) -> None: ...
    def kill(self) -> None: ...


async def pool_of(
    count: int, deadly: dict[str, int], sentences: int = 3, timeout: float = 60
) -> tuple[Pool, list[FakeWorker]]:
    workers = [FakeWorker(deadly) for _ in range(count)]
    pool = Pool(workers, Scheduler(10**6, 0.001, 10**6, sentences), timeout)  # type: ignore[arg-type]
    await pool.start([ModelSpec("a", ("a",))])
    return pool, workers


class NewCheckpoint(ModelSpec):
    def newest(self, checkpoint: str) -> Version:
        return NEW


class LightService(Service):
    """A service of one model over a pool of fake workers; each line of a text is a sentence."""

    def __init__(self, pool: Pool) -> None:
        self.config, self.pool = serve_config(), pool
        self.search, self.closing, self.reloading = self.config.search, False, asyncio.Lock()
        self.specs = {"a": NewCheckpoint("a", ("a",))}
        self.models, self.versions, self.requests = {"a": model_info("a")}, {"a": ()}, {}
        self.tokenizers = {}

    async def _sentences(self, task: Task, texts: list[str], split: bool) -> list[list[str]]:
        return [text.splitlines() for text in texts]


def requests(pool: Pool, texts: Sequence[Sequence[str]]) -> list[Pending]:
    submitted = [Pending("key", part, part) for part in texts]
    for request in submitted:
        pool.submit(request)
    return submitted


def test_tokens_are_counted_with_and_without_their_probabilities() -> None:
    """Of the source and of the target, each with its end mark; an empty sentence has none."""

    async def counted(probabilities: bool) -> tuple[int, int]:
        logs = (-0.5, -0.25, -0.125) if probabilities else ()
        pieces: list[tuple[str, ...]] = [("▁a", "▁b"), ()]
        found = [Translation("", p, 0, 0, False, ("▁x", "</s>"), logs[: len(p) + 1], None) for p in pieces]
        request = Pending("key", ["x", "y", ""], ["x", "y", ""])
        for i, answer in enumerate(([found[0]], [found[1]], [EMPTY])):
            request.deliver(i, answer, 1)
        counters = Counters()
        counters.add([Part(request, i) for i in range(3)], 1.0)
        return counters.source_tokens, counters.target_tokens

    assert asyncio.run(counted(True)) == asyncio.run(counted(False)) == (4, 4)


@pytest.mark.parametrize(("engine", "needed"), [("torch float32", True), ("ctranslate2 4.6.0 int8", False)])
def test_only_an_engine_that_saves_a_pass_leaves_probabilities_out(engine: str, needed: bool) -> None:
    """With torch, requests that read them and those that do not share batches."""

    async def tasks() -> list[Task]:
        pool, _ = await pool_of(1, {})
        service = LightService(pool)
        service.models = {"a": model_info("a", engine=engine)}
        return [service._task("translate", "a", None, False, given) for given in (False, True)]

    without, with_them = asyncio.run(tasks())
    assert (without.probabilities, with_them.probabilities) == (needed, True)
    assert (without == with_them) == needed


def test_a_worker_asks_its_translator_for_what_the_task_says() -> None:
    asked: list[dict[str, Any]] = []

    class FakeTranslator:
        def translate(self, sources: list[str], search: Any, **options: Any) -> list[Any]:
            asked.append({"sources": sources, **options})
            return []

    models = Models(serve_config())
    models.loaded["a"] = SimpleNamespace(translator=FakeTranslator())  # type: ignore[assignment]
    for attention, probabilities in ((False, False), (False, True), (True, True)):
        task = Task("translate", "a", models.config.search, attention, probabilities)
        models._translate(task, [("x", ""), ("y", "p")], lambda *_: None)
        expected = {"attention": attention, "probabilities": probabilities, "on_step": None}
        assert asked.pop() == {"sources": ["x", "y"], "prefixes": ["", "p"], **expected}


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


@pytest.mark.parametrize("idle", [False, True])
def test_a_worker_that_cannot_be_replaced_is_tried_again(
    idle: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever its start raises; the request waits, and a process without its models does not count as alive."""
    failures = (RuntimeError("CUDA out of memory"), WorkerDiedError(), OSError("no process left"))
    monkeypatch.setattr(FakeWorker, "failures", failures)
    monkeypatch.setattr("seq2seq.serving.pool.RESTART_DELAYS", (0.0, 0.01))

    async def run() -> None:
        pool, (fake,) = await pool_of(1, {} if idle else {"deadly": 1}, sentences=1)
        fake.alive = not idle
        (request,) = requests(pool, [["deadly"]])
        await request.done
        assert request.results == [("DEADLY", 0)] and fake.starts == 5
        assert fake.alive_at_start[2:] == [False] * 3  # after each failure
        assert (pool.stats().workers, pool.stats().restarts) == (1, 1)
        await pool.close()

    asyncio.run(asyncio.wait_for(run(), 10))
    reasons = [text.partition("started: ")[2] for text in caplog.messages[1:]]
    assert reasons == ["CUDA out of memory", "it died", "no process left"]


def test_a_process_that_the_system_refuses_may_be_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that it replaces is dead by then."""
    started: list[str] = []

    class FakeProcess:
        def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
            self.pipe, self.running = args[0], False

        def start(self) -> None:
            started.append("refused" if len(started) == 1 else "started")
            if started[-1] == "refused":
                raise BlockingIOError("Resource temporarily unavailable")
            self.running = True
            self.pipe.send_bytes(pickle.dumps(("done", [])))

        def kill(self) -> None:
            assert self.running

        def join(self) -> None: ...

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=FakeProcess)
    monkeypatch.setattr(workers_module, "start_method", lambda: context)
    worker = Worker(serve_config())
    worker.start([])
    with pytest.raises(BlockingIOError):
        worker.start([])
    worker.stop()
    worker.start([])
    assert started == ["started", "refused", "started"]


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


def test_an_error_is_that_of_the_request_that_caused_it() -> None:
    """Other requests of the same batch are answered."""

    async def run() -> None:
        pool, _ = await pool_of(1, {}, sentences=9)
        first, wrong, last = requests(pool, [["a", "b"], ["c", "wrong"], ["d"]])
        await asyncio.wait([first.done, wrong.done, last.done])
        assert isinstance(wrong.done.exception(), UserError)
        assert [result for request in (first, last) for result, _ in request.results] == ["A", "B", "D"]
        await pool.close()

    asyncio.run(run())


def test_a_worker_that_does_not_answer_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """It is stopped when nobody can wait for its batch any more; the batch is not repeated."""

    async def run() -> None:
        pool, (worker,) = await pool_of(1, {}, sentences=1, timeout=0.02)
        stuck, other = requests(pool, [["endless"], ["fine"]])
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stuck.done, 0.015)
        await other.done
        assert other.results == [("FINE", 0)] and worker.starts == 2
        assert [record.message for record in caplog.records] == [
            "a worker process was stopped after timeout_s; another one replaces it"
        ]
        await pool.close()

    asyncio.run(run())


def test_after_its_end_a_pool_neither_repeats_nor_replaces(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)

    async def run() -> None:
        pool, (worker,) = await pool_of(1, {}, sentences=1)
        requests(pool, [["endless"], ["fine"]])
        await asyncio.sleep(0.01)
        pool.kill()
        worker.stop()
        await asyncio.sleep(0.01)
        assert (worker.starts, caplog.messages, pool.tasks) == (1, [], set())

    asyncio.run(run())


def test_workers_that_died_while_idle_cost_no_request_its_answer() -> None:
    """They are replaced before a batch meets them, and when somebody asks for the server's health."""

    async def run() -> None:
        pool, fakes = await pool_of(2, {})
        for _ in range(2):
            for fake in fakes:
                fake.alive = False
            (request,) = requests(pool, [["a"]])
            await request.done
            assert request.results == [("A", 0)]
        while len(pool.idle) < 2:
            await asyncio.sleep(0.001)
        fakes[0].alive = False
        pool.replace_dead()
        assert len(pool.idle) == 1
        while len(pool.idle) < 2:
            await asyncio.sleep(0.001)
        assert all(fake.alive for fake in fakes) and pool.stats().restarts >= 4
        await pool.close()

    asyncio.run(run())


def test_a_reload_goes_on_without_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a worker has loaded, it gets no batch; a reload of a server that closes is refused."""
    monkeypatch.setattr(service_module, "Tokenizer", dict)
    monkeypatch.setattr(FakeWorker, "load_seconds", 0.03)

    async def run() -> None:
        pool, fakes = await pool_of(2, {})
        service = LightService(pool)
        caller = asyncio.ensure_future(service.reload())
        await asyncio.sleep(0.01)
        caller.cancel()
        submitted = requests(pool, [["a"] * 4 for _ in range(8)])
        await asyncio.gather(caller, *(request.done for request in submitted), return_exceptions=True)
        assert [request.done.exception() for request in submitted] == [None] * 8
        while len(pool.idle) < 2:
            await asyncio.sleep(0.001)
        assert caller.cancelled() and [fake.loaded for fake in fakes] == [["a"], ["a"]]
        assert [info.update for info in await service.reload()] == [1]
        service.closing = True
        with pytest.raises(Closing):
            await service.reload()
        await pool.close()

    asyncio.run(run())


def test_a_slow_reader_of_a_stream_gets_the_newest_texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text grows from one to the next, and does not follow its translation."""
    monkeypatch.setattr(FakeWorker, "steps", 100)
    lines = [letter * 100 for letter in "abcdefghijklmnop"]

    async def run() -> None:
        pool, _ = await pool_of(1, {}, sentences=1)
        events = []
        async for event in LightService(pool).stream("\n".join(lines)):
            events.append(event)
            await asyncio.sleep(0.004 if isinstance(event, Partial) else 0)
        translated = [event.source for event in events if not isinstance(event, Partial)]
        assert translated == lines and isinstance(events[0], Partial)
        for i, line in enumerate(lines):
            until = next(n for n, event in enumerate(events) if not isinstance(event, Partial) and event.source == line)
            grown = [(n, len(e.text)) for n, e in enumerate(events) if isinstance(e, Partial) and e.sentence == i]
            lengths = [length for _, length in grown]
            assert lengths == sorted(set(lengths)) and len(lengths) < 50
            assert all(n < until for n, _ in grown)
        await pool.close()

    asyncio.run(run())
