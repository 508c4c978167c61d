"""The service: texts in, translations out; worker processes run the models on sentences of all requests together."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from seq2seq.config.schema import SearchConfig, ServeConfig
from seq2seq.data.tokenizer import Tokenizer
from seq2seq.inference.streaming import split_text
from seq2seq.inference.translator import Translation, token_budget
from seq2seq.inference.workers import choose_processes
from seq2seq.serving.interface import (
    Alternative,
    Busy,
    Closing,
    Histogram,
    ModelInfo,
    Partial,
    SentenceResult,
    ServiceError,
    Stats,
    TextResult,
    TimedOut,
    TooLarge,
    UnknownModel,
    WorkerLost,
)
from seq2seq.serving.pool import Pending, Pool
from seq2seq.serving.scheduler import Scheduler, cost
from seq2seq.serving.text import clean, text_result
from seq2seq.serving.workers import Kind, Loaded, ModelSpec, Task, Version, Worker, folders_of, model_specs
from seq2seq.utils.device import choose_device
from seq2seq.utils.errors import UserError, nearest

__all__ = [
    "Alternative",
    "Busy",
    "Closing",
    "Histogram",
    "ModelInfo",
    "Partial",
    "SentenceResult",
    "Service",
    "ServiceError",
    "Stats",
    "TextResult",
    "TimedOut",
    "TooLarge",
    "UnknownModel",
    "WorkerLost",
]

log = logging.getLogger("seq2seq.serving")

# Sentences of a batch: on a CPU, 512 reach 85 % of the speed of thousands in greedy search, and more delay others.
CPU_SENTENCES, GPU_SENTENCES = 512, 8192
LONGEST_RETRY = 600  # seconds that a client is asked to wait at most
LONG_TEXT = 20_000  # characters that are split outside the event loop
MOST_WEIGHTS = 1_000_000  # attention weights of an answer: about 10 MB of JSON
ESTIMATE_ERROR = 4  # a worker accepts up to this multiple of the limits, because lengths are estimates
Answer = tuple[list[Translation], int | None]  # of a sentence, with the update of its checkpoint


class Service:
    """Answers the requests of one event loop."""

    def __init__(self, config: ServeConfig, pool: Pool) -> None:
        self.config, self.search, self.pool = config, config.search, pool
        self.specs = {spec.name: spec for spec in model_specs(config)}
        self.models: dict[str, ModelInfo] = {}  # in the order given; the first is the default
        self.tokenizers: dict[str, Tokenizer] = {}
        self.versions: dict[str, Version] = {}
        self.requests: dict[Pending, None] = {}  # not yet answered
        self.closing = False
        self.reloading = asyncio.Lock()

    # --------------------------------------------------------------------------------- start and end

    @classmethod
    async def start(cls, config: ServeConfig) -> Service:
        """Start the worker processes and load every model."""
        device, _ = choose_device(config.device)
        count = choose_processes("auto", device) if config.processes == "auto" else config.processes
        tokens = token_budget(config.search, device) if config.batch_tokens == "auto" else config.batch_tokens
        sentences = CPU_SENTENCES if device.type == "cpu" else GPU_SENTENCES
        scheduler = Scheduler(tokens, config.batch_wait_ms / 1000, config.max_queue_characters, sentences)
        service = cls(config, Pool([Worker(config) for _ in range(count)], scheduler, config.timeout_s))
        try:
            loaded = await service.pool.start(list(service.specs.values()))
        except BaseException:
            service.kill()
            raise
        for name, one in zip(service.specs, loaded, strict=True):
            service._remember(name, one)
        if config.reload_s:
            service.pool.spawn(service._poll())
        return service

    async def close(self) -> None:
        """Answer what was accepted, refuse what is new, and end the workers."""
        self.closing = True
        if waiting := [request.done for request in self.requests]:
            await asyncio.wait(waiting, timeout=self.config.shutdown_s)
        self._refuse_all()
        await self.pool.close()

    def kill(self) -> None:
        """End the workers at once."""
        self.closing = True
        self._refuse_all()
        self.pool.kill()

    def _refuse_all(self) -> None:
        for request in self.requests:
            request.fail(Closing())

    # ------------------------------------------------------------------------------------- requests

    async def translate(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        search: SearchConfig | None = None,
        prefixes: Sequence[str] | None = None,
        attention: bool = False,
        split: bool = True,
        probabilities: bool = True,
    ) -> list[TextResult]:
        """Translate each text, sentence by sentence; a prefix begins the translation of its text's first sentence.

        `probabilities=False` permits an engine to omit the log probability of each subword.
        """
        if prefixes is not None and len(prefixes) != len(texts):
            raise UserError(f"prefix: {len(prefixes)} prefixes for {len(texts)} texts; give one for each", code=2)
        self.check_size([*texts, *(prefixes or ())], len(texts))
        task = self._task("translate", model, search, attention, probabilities)
        texts = [clean(text) for text in texts]
        prefixes = [""] * len(texts) if prefixes is None else [clean(prefix) for prefix in prefixes]
        by_text = await self._sentences(task, texts, split)
        if attention:
            self._estimate_weights(task, [sentence for sentences in by_text for sentence in sentences])
        items = [item for pair in zip(by_text, prefixes, strict=True) for item in with_prefix(*pair)]
        answers = iter(await self._answer(Pending(task, items, [source for source, _ in items], task.search.rows)))
        return [
            text_result(text, [sentence_result(source, next(answers)) for source in sources])
            for text, sources in zip(texts, by_text, strict=True)
        ]

    async def stream(
        self, text: str, *, model: str | None = None, search: SearchConfig | None = None, prefix: str = ""
    ) -> AsyncIterator[Partial | SentenceResult]:
        """Yield the best hypotheses as they grow, and each sentence's translations in order."""
        self.check_size([text, prefix], 1)
        task, text = self._task("stream", model, search), clean(text)
        (sources,) = await self._sentences(task, [text], True)
        grown: dict[int, str] = {}  # newest texts that are not yet yielded: a slow reader gets fewer of them
        changed = asyncio.Event()  # a text has grown, a sentence is translated, or all has failed

        def grow(index: int, partial: str) -> None:
            grown[index] = partial
            changed.set()

        def wake(done: asyncio.Task[list[Any]]) -> None:
            if not done.cancelled():
                done.exception()  # raised below, unless the caller has left
            changed.set()

        request = Pending(task, with_prefix(sources, clean(prefix)), sources, task.search.rows)
        request.on_partial, request.on_result = grow, changed.set
        answer = asyncio.ensure_future(self._answer(request))
        answer.add_done_callback(wake)
        first = 0  # sentence that is not yet yielded
        try:
            while first < len(sources):
                await changed.wait()
                changed.clear()
                for index in list(grown):
                    partial = Partial(index, grown.pop(index))
                    if index >= first:
                        yield partial
                while first < len(sources) and request.results[first] is not None:
                    yield sentence_result(sources[first], request.results[first])
                    first += 1
                if answer.done():
                    answer.result()
            await answer
        finally:
            answer.cancel()

    async def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        model: str | None = None,
        search: SearchConfig | None = None,
        attention: bool = False,
    ) -> list[Translation]:
        """Score each target as a translation of its source."""
        if len(sources) != len(targets):
            raise UserError(f"target: {len(targets)} targets for {len(sources)} sources; give one for each", code=2)
        task = self._task("score", model, search, attention)
        self.check_size([*sources, *targets], len(sources))
        items = [(clean(source), clean(target)) for source, target in zip(sources, targets, strict=True)]
        if attention:
            self._estimate_weights(task, [max(pair, key=len) for pair in items])
        answers = await self._answer(Pending(task, items, [source + target for source, target in items]))
        return [translation for translation, _ in answers]

    async def alternatives(
        self, source: str, prefix: str, *, model: str | None = None, search: SearchConfig | None = None, count: int = 6
    ) -> list[Alternative]:
        """Return the likeliest next subwords after a prefix, each with the translation that continues with it."""
        self.check_size([source, prefix], 1)
        task, source = self._task("alternatives", model, search), clean(source).strip()
        if not source:
            return []
        request = Pending(task, [(source, clean(prefix), count)], [source], task.search.rows * count)
        ((found, _),) = await self._answer(request)
        return list(found)

    def _task(
        self,
        kind: Kind,
        model: str | None,
        search: SearchConfig | None,
        attention: bool = False,
        probabilities: bool = True,
    ) -> Task:
        """Return the work that a request asks for, if the service may take it."""
        if self.closing:
            raise Closing
        info = self.info(model)
        # torch has the probabilities at no cost, and equal tasks share batches.
        return Task(kind, info.name, search or self.search, attention, probabilities or info.engine.startswith("torch"))

    def info(self, model: str | None) -> ModelInfo:
        """Return the model of a name, or the first one."""
        name = next(iter(self.models)) if model is None else model
        if name not in self.models:
            raise UnknownModel(
                f"model: no model {name!r}; possible: {', '.join(self.models)}{nearest(name, self.models)}"
            )
        return self.models[name]

    async def _sentences(self, task: Task, texts: list[str], split: bool) -> list[list[str]]:
        """Return each text's sentences; one without splitting, none of a blank text."""
        if not split:
            by_text = [[stripped] if (stripped := text.strip()) else [] for text in texts]
        elif sum(map(len, texts)) < LONG_TEXT:
            by_text = self._split(task, texts)
        else:  # elsewhere, as the event loop serves everybody
            by_text = await asyncio.get_running_loop().run_in_executor(None, self._split, task, texts)
        self.check_size((), sum(map(len, by_text)))
        return by_text

    def _split(self, task: Task, texts: list[str]) -> list[list[str]]:
        tokenizer, limit = self.tokenizers[task.model], self.models[task.model].max_length
        return [split_text(text, lambda part: len(tokenizer.encode_source([part])[0]) <= limit) for text in texts]

    def check_size(self, texts: Sequence[str], sentences: int) -> None:
        """Refuse more characters or sentences than one request may have."""
        for count, what, key in (
            (sum(map(len, texts)), "characters", "max_characters"),
            (sentences, "sentences", "max_sentences"),
        ):
            if count > (most := getattr(self.config, key)):
                raise TooLarge(
                    f"{count:,} {what} exceed this server's limit of {most:,} ({key}); divide them among requests"
                )

    def _estimate_weights(self, task: Task, texts: Sequence[str]) -> None:
        """Refuse attention that would use too much memory before it is known to be too much for an answer."""
        info = self.models[task.model]
        squares = sum(min(cost(text), info.max_length) ** 2 for text in texts)
        check_weights(squares * info.layers * info.heads * task.search.n_best // ESTIMATE_ERROR)

    async def _answer(self, request: Pending) -> list[Any]:
        """Return the results of a request, each with its update; what waits of it is dropped with its caller."""
        if self.closing:
            raise Closing
        if not self.pool.scheduler.has_room(request.characters):
            raise Busy(min(max(1, math.ceil(self.pool.seconds_until_room())), LONGEST_RETRY))
        self.requests[request] = None
        self.pool.submit(request)
        try:
            await asyncio.wait_for(request.done, self.config.timeout_s)
        except asyncio.TimeoutError:
            limit = f"{self.config.timeout_s:g} s (timeout_s)"
            raise TimedOut(f"not done after {limit}; send less text at a time") from None
        finally:
            self.pool.scheduler.cancel(request)
            del self.requests[request]
        return request.results

    # -------------------------------------------------------------------------------------- reloads

    async def reload(self, model: str | None = None) -> list[ModelInfo]:
        """Load newer checkpoints, if any, while requests go on; after an error the former ones stay.

        A caller who leaves does not end it: no other work may reach a worker that loads.
        """
        names = list(self.models) if model is None else [self.info(model).name]
        if self.closing:
            raise Closing
        loading = self.pool.spawn(self._reload_all(names))
        loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # though nobody asks any more
        await asyncio.wait([loading])
        if loading.cancelled():
            raise Closing
        loading.result()
        return [self.models[name] for name in names]

    async def _reload_all(self, names: Sequence[str]) -> None:
        async with self.reloading:
            for name in names:
                await self._reload(self.specs[name])

    async def _reload(self, spec: ModelSpec) -> None:
        while (newest := spec.newest(self.config.checkpoint)) != self.versions[spec.name]:
            try:
                loaded = await self.pool.load(replace(spec, folders=folders_of(newest)))
            except UserError:
                if spec.newest(self.config.checkpoint) == newest:
                    raise
                continue  # training has replaced it meanwhile
            self._remember(spec.name, loaded)
            self.pool.counters.reloads += 1
            log.info("%s: update %s", spec.name, loaded.info.update)

    def _remember(self, name: str, loaded: Loaded) -> None:
        self.models[name], self.versions[name] = loaded.info, loaded.version
        self.tokenizers[name] = Tokenizer(loaded.tokenizers)
        self.specs[name] = replace(self.specs[name], folders=folders_of(loaded.version))
        self.pool.specs = list(self.specs.values())

    async def _poll(self) -> None:
        """Look for newer checkpoints; report each problem once."""
        problem = ""
        while True:
            await asyncio.sleep(self.config.reload_s)
            try:
                await self.reload()
                problem = ""
            except Closing:
                return
            except Exception as error:  # the next look may succeed
                if str(error) != problem:
                    log.warning("%s; the former checkpoint stays", error)
                problem = str(error)

    def check_health(self) -> None:
        """Raise an error while no request can be answered."""
        if self.closing:
            raise Closing
        self.pool.replace_dead()
        if not self.stats().workers:
            raise WorkerLost("no worker process is alive; the server starts others")

    def stats(self) -> Stats:
        return self.pool.stats()


def check_weights(count: int) -> None:
    """Refuse an answer with so many attention weights that writing it would keep other clients waiting."""
    if count > MOST_WEIGHTS:
        remedy = "send less text at a time, or ask /v1/attention for one layer and head"
        raise TooLarge(f"attention: {count:,} weights exceed the limit of {MOST_WEIGHTS:,}; {remedy}")


def with_prefix(sentences: Sequence[str], prefix: str) -> list[tuple[str, str]]:
    """Return a text's sentences, the first with the text's prefix."""
    return [(sentence, "" if i else prefix) for i, sentence in enumerate(sentences)]


def sentence_result(source: str, answer: Answer) -> SentenceResult:
    translations, update = answer
    return SentenceResult(source, tuple(translations), update)
