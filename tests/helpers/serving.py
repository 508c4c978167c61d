"""A service without models, and requests to the application in the same process."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import httpx
import torch
import yaml
from fastapi import FastAPI

from seq2seq.config.loading import build_config, default_choices, search_preset, to_dict
from seq2seq.config.paths import CONFIGS
from seq2seq.config.schema import SearchConfig, ServeConfig
from seq2seq.inference.translator import EMPTY, Translation
from seq2seq.serving.app import create_app
from seq2seq.serving.interface import (
    Alternative,
    Histogram,
    ModelInfo,
    Partial,
    SentenceResult,
    Stats,
    TextResult,
)
from seq2seq.serving.service import Service

ADDRESS = "http://127.0.0.1"
SENTENCE = re.compile(r"[^\s.](?:[^.\n\r]*[^\s.])?\.?")
LAYERS, HEADS = 2, 3


def serve_config(**changes: Any) -> ServeConfig:
    """The defaults of configs/serve.yaml, with changes."""
    return build_config(ServeConfig, {**_defaults(), **changes})


@cache
def _defaults() -> dict[str, Any]:
    values = yaml.safe_load((CONFIGS / "serve.yaml").read_text(encoding="utf-8"))
    del values["defaults"]
    return {**values, "search": to_dict(search_preset(default_choices("serve")["search"] or "beam"))}


def model_info(name: str = "toy", source: str = "en", target: str = "de", **changes: Any) -> ModelInfo:
    facts: dict[str, Any] = {"runs": (name,), "checkpoint": f"{name}/checkpoints/update-0000007", "update": 7}
    facts |= {"engine": "torch", "family": "transformer", "parameters": 1000, "max_length": 256}
    facts |= {"layers": LAYERS, "heads": HEADS, "scores": {"bleu": 30.5}, "config": {"name": name}}
    return ModelInfo(name, source, target, **{**facts, **changes})


class FakeService(Service):
    """Translates a sentence into its words backwards; nth-best translations end in n marks."""

    def __init__(self, models: Sequence[ModelInfo] | None = None, search: SearchConfig | None = None) -> None:
        self.models = {model.name: model for model in models or [model_info()]}
        self.config, self.search = serve_config(), search or search_preset("beam")
        self.calls: list[dict[str, Any]] = []
        self.failure: Exception | None = None  # raised by every method
        self.breaks: Exception | None = None  # raised by a stream after its first part
        self.waiting: asyncio.Event | None = None  # requests wait for it
        self.endless = False  # whether a stream goes on until it is closed
        self.cancelled = self.closed = 0
        self.closing = False
        self.alphabets: dict[str, str] = {}  # of a model: the signs that it can read

    async def _begin(self, texts: Sequence[str] = (), sentences: int = 0, **call: Any) -> ModelInfo:
        self.check_size(texts, sentences)
        self.calls.append(call)
        if self.failure:
            raise self.failure
        if self.waiting:
            try:
                await self.waiting.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return self.info(call["model"])

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
        info = await self._begin(
            [*texts, *(prefixes or ())],
            len(texts),
            model=model,
            search=search,
            prefixes=prefixes,
            attention=attention,
            split=split,
            probabilities=probabilities,
        )
        n_best = (search or self.search).n_best
        return [self._text(text, n_best, attention, split, info) for text in texts]

    def _text(self, text: str, n_best: int, attention: bool, split: bool, info: ModelInfo) -> TextResult:
        spans = [match.span() for match in SENTENCE.finditer(text)] if split else [(0, len(text))]
        sentences = tuple(self._sentence(text[a:b], n_best, attention, info) for a, b in spans)
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        gaps = tuple(text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
        best = [sentence.translations[0].text for sentence in sentences]
        whole = gaps[0] + "".join(part + gap for part, gap in zip(best, gaps[1:], strict=True))
        return TextResult(whole, sentences, gaps)

    def _sentence(self, source: str, n_best: int, attention: bool, info: ModelInfo) -> SentenceResult:
        if not source.strip():
            return SentenceResult(source, (EMPTY,), info.update)
        translations = tuple(
            self._translation(source, backwards(source) + "!" * n, attention, info) for n in range(n_best)
        )
        return SentenceResult(source, translations, info.update)

    def _translation(self, source: str, target: str, attention: bool, info: ModelInfo) -> Translation:
        known = self.alphabets.get(info.name)
        source_pieces = (*(w if not known or set(w) <= set(known) else "<unk>" for w in pieces_of(source)), "</s>")
        pieces = pieces_of(target)
        logs = tuple(-0.1 * (i + 1) for i in range(len(pieces) + 1))
        shape = (info.layers, info.heads, len(pieces) + 1, len(source_pieces))
        weights = torch.arange(math.prod(shape)).reshape(shape).float().softmax(-1) if attention else None
        return Translation(target, pieces, sum(logs) / 2, sum(logs), False, source_pieces, logs, weights)

    async def stream(
        self, text: str, *, model: str | None = None, search: SearchConfig | None = None, prefix: str = ""
    ) -> AsyncIterator[Partial | SentenceResult]:
        info = await self._begin([text, prefix], model=model, search=search, prefix=prefix)
        for i, sentence in enumerate(self._text(text, (search or self.search).n_best, False, True, info).sentences):
            yield Partial(i, sentence.translations[0].text[:1])
            if self.breaks:
                raise self.breaks
            yield sentence
        try:
            while self.endless:
                yield Partial(0, "")
                await asyncio.sleep(0)
        finally:
            self.closed += 1

    async def score(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        model: str | None = None,
        search: SearchConfig | None = None,
        attention: bool = False,
    ) -> list[Translation]:
        info = await self._begin([*sources, *targets], model=model, attention=attention)
        pairs = zip(sources, targets, strict=True)
        return [self._translation(source, target, attention, info) for source, target in pairs]

    async def alternatives(
        self, source: str, prefix: str, *, model: str | None = None, search: SearchConfig | None = None, count: int = 6
    ) -> list[Alternative]:
        await self._begin([source, prefix], model=model, count=count)
        return [Alternative(f"▁{n}", 0.5**n, f"{prefix} {n}") for n in range(1, count + 1)]

    async def reload(self, model: str | None = None) -> list[ModelInfo]:
        await self._begin(reload=model, model=model)
        self.models = {name: replace(info, update=8) for name, info in self.models.items()}
        return list(self.models.values())

    async def close(self) -> None:
        return None

    def check_health(self) -> None:
        if self.failure:
            raise self.failure

    def stats(self) -> Stats:
        return Stats(
            queued_sentences=3,
            queued_characters=70,
            running_sentences=2,
            batches=5,
            sentences=9,
            source_tokens=100,
            target_tokens=90,
            batch_sizes=Histogram((1, 2, 4), (2, 1, 1, 1), 9),
            batch_seconds=Histogram((0.1, 1.0), (4, 1, 0), 0.8),
            workers=2,
            restarts=1,
            reloads=0,
        )


def backwards(sentence: str) -> str:
    return " ".join(reversed(sentence.split()))


def pieces_of(text: str) -> tuple[str, ...]:
    return tuple(f"▁{word}" for word in text.split())


class Web:
    """The application over a fake service, and requests to it."""

    def __init__(self, service: FakeService | None = None, **config: Any) -> None:
        self.service = service or FakeService()
        self.service.config = self.config = serve_config(**config)
        self.app: FastAPI = create_app(self.service, self.config)

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url=ADDRESS, trust_env=False) as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, json: Any = None, **arguments: Any) -> httpx.Response:
        return self.request("POST", path, **({"json": json} if json is not None else {}), **arguments)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve an application by uvicorn on a free port, in a thread; yield its address."""
    import threading
    import time

    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
