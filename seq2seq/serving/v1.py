"""The server's own API below /v1: everything that a model can show."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from seq2seq.config.loading import search_preset, to_dict
from seq2seq.config.paths import choices
from seq2seq.inference.translator import EMPTY, Translation
from seq2seq.serving.answers import Refused, dumps, error_answer, json_answer
from seq2seq.serving.bodies import Api
from seq2seq.serving.interface import ModelInfo, Partial, SentenceResult, ServiceError
from seq2seq.serving.limits import SERVER_KEYS, search_of, search_options
from seq2seq.serving.openapi import route
from seq2seq.serving.schemas import (
    AlternativesAnswer,
    AlternativesBody,
    AttentionAnswer,
    AttentionBody,
    ModelsAnswer,
    ReloadBody,
    ScoreAnswer,
    ScoreBody,
    SearchAnswer,
    StreamBody,
    TranslateAnswer,
    TranslateBody,
)
from seq2seq.serving.service import check_weights
from seq2seq.serving.text import clean, text_result
from seq2seq.utils.errors import UserError

DECIMALS = 6  # of an attention weight
NO_STORE = {"cache-control": "no-store", "x-accel-buffering": "no"}  # nginx must pass each event on at once


class V1(Api):
    def add_to(self, router: APIRouter) -> None:
        add = partial(route, router, tag="seq2seq")
        add("POST", "/v1/translate", self.translate, TranslateBody, TranslateAnswer)
        add("POST", "/v1/stream", self.stream, StreamBody, media="text/event-stream")
        add("POST", "/v1/score", self.score, ScoreBody, ScoreAnswer)
        add("POST", "/v1/alternatives", self.alternatives, AlternativesBody, AlternativesAnswer)
        add("POST", "/v1/attention", self.attention, AttentionBody, AttentionAnswer)
        add("GET", "/v1/models", self.models, answer=ModelsAnswer)
        add("GET", "/v1/search", self.search, answer=SearchAnswer)
        add("POST", "/v1/reload", self.reload, ReloadBody, ModelsAnswer)

    async def translate(self, request: Request) -> Response:
        """Translate texts, with the probability of every subword.

        A text is translated sentence by sentence; its blank lines, spaces and line ends are kept.
        """
        body = await self.read(request, TranslateBody)
        texts = [body.text] if isinstance(body.text, str) else body.text
        prefixes = [body.prefix] if isinstance(body.prefix, str) else body.prefix
        info, search = self.service.info(body.model), search_of(body.search, self.service.search)
        results = await self.service.translate(
            texts, model=info.name, search=search, prefixes=prefixes, attention=body.attention, split=body.split
        )
        check_weights(sum(weights_of(t) for r in results for s in r.sentences for t in s.translations))
        answers = [
            {"text": r.text, "gaps": r.gaps, "sentences": [sentence_json(s) for s in r.sentences]} for r in results
        ]
        update = newest([s for r in results for s in r.sentences], info)
        return json_answer({"model": info.name, "update": update, "results": answers})

    async def stream(self, request: Request) -> Response:
        """Translate one text, and send the translation as it grows, as server-sent events.

        - `partial`: `{"sentence", "text"}`, the best hypothesis of a sentence so far
        - `sentence`: `{"index", …}`, a sentence as in /v1/translate
        - `done`: `{"text", "gaps", "model", "update"}`, and the stream ends
        - `error`: `{"error"}`, and the stream ends
        """
        body = await self.read(request, StreamBody)
        info, search = self.service.info(body.model), search_of(body.search, self.service.search)
        results = self.service.stream(body.text, model=info.name, search=search, prefix=body.prefix)
        events = event_stream(results, body.text, info)
        # Until the first event, an error has a status of its own.
        return EventStream(await anext(events), events)

    async def score(self, request: Request) -> Response:
        """Score given translations, subword by subword."""
        body = await self.read(request, ScoreBody)
        info, search = self.service.info(body.model), search_of(body.search, self.service.search)
        scored = await self.service.score(
            body.source, body.target, model=info.name, search=search, attention=body.attention
        )
        check_weights(sum(map(weights_of, scored)))
        results = [{**source_json(t), **translation_json(t)} for t in scored]
        return json_answer({"model": info.name, "update": info.update, "results": results})

    async def alternatives(self, request: Request) -> Response:
        """Return the likeliest subwords after a prefix, each with the translation that goes on from it."""
        body = await self.read(request, AlternativesBody)
        info, search = self.service.info(body.model), search_of(body.search, self.service.search)
        found = await self.service.alternatives(
            body.text, body.prefix, model=info.name, search=search, count=body.count
        )
        return json_answer({"alternatives": [alternative._asdict() for alternative in found]})

    async def attention(self, request: Request) -> Response:
        """Return what each target subword attended to in the source, of one layer and head or the mean of several."""
        body = await self.read(request, AttentionBody)
        info = self.service.info(body.model)
        for key, chosen, count in (("layer", body.layer, info.layers), ("head", body.head, info.heads)):
            if chosen is not None and not 0 <= chosen < count:
                raise Refused(400, f"{key}: {chosen} is out of range; {info.name} has {key}s 0 to {count - 1}")
        translation = await self.with_attention(body, info)
        weights = []
        if translation.weights_LNTS is not None:
            weights_TS = translation.attention(body.layer, body.head)
            weights = weights_TS.double().round(decimals=DECIMALS).tolist()
        pieces = {"source_pieces": translation.source_pieces, "pieces": translation.pieces}
        return json_answer({**pieces, "weights": weights, "layers": info.layers, "heads": info.heads})

    async def with_attention(self, body: AttentionBody, info: ModelInfo) -> Translation:
        """Return the given translation, or the best one."""
        if body.target is not None:
            return (await self.service.score([body.text], [body.target], model=info.name, attention=True))[0]
        (result,) = await self.service.translate([body.text], model=info.name, attention=True, split=False)
        return result.sentences[0].translations[0] if result.sentences else EMPTY

    async def models(self, request: Request) -> Response:
        """List the models; the first is the default."""
        self.authorize(request)
        return json_answer(models_json(list(self.service.models.values())))

    async def search(self, request: Request) -> Response:
        """List the options of the search with their defaults on this server, and the presets."""
        self.authorize(request)
        presets = {
            name: {key: value for key, value in to_dict(search_preset(name)).items() if key not in SERVER_KEYS}
            for name in choices("search")
        }
        return json_answer({"options": search_options(self.service.search), "presets": presets})

    async def reload(self, request: Request) -> Response:
        """Load newer checkpoints, if there are any, while requests go on."""
        body = await self.read(request, ReloadBody, default=b"{}")
        await self.service.reload(body.model)
        return json_answer(models_json(list(self.service.models.values())))


# --------------------------------------------------------------------------------------------- values in JSON


def models_json(models: Sequence[ModelInfo]) -> dict[str, Any]:
    return {"models": [to_dict(model) for model in models], "default": models[0].name}


def sentence_json(sentence: SentenceResult) -> dict[str, Any]:
    best = sentence.translations[0]
    translations = [translation_json(translation) for translation in sentence.translations]
    return {"source": sentence.source, **source_json(best), "translations": translations}


def source_json(translation: Translation) -> dict[str, Any]:
    return {"source_pieces": translation.source_pieces, "truncated": translation.truncated}


def translation_json(translation: Translation) -> dict[str, Any]:
    values = {
        "text": translation.text,
        "score": translation.score,
        "log_probability": translation.log_probability,
        "pieces": translation.pieces,
        "probabilities": [math.exp(log) for log in translation.token_log_probabilities],
    }
    if translation.weights_LNTS is None:
        return values
    weights = translation.weights_LNTS.double().round(decimals=DECIMALS).tolist()
    return {**values, "attention": {"weights": weights}}


def weights_of(translation: Translation) -> int:
    """Return the number of its attention weights."""
    return 0 if translation.weights_LNTS is None else translation.weights_LNTS.numel()


def newest(sentences: Sequence[SentenceResult], info: ModelInfo) -> int | None:
    """Return the newest update that translated a sentence; a reload may come between two of them."""
    return max((s.update for s in sentences if s.update is not None), default=info.update)


# --------------------------------------------------------------------------------------------- events


async def event_stream(
    results: AsyncIterator[Partial | SentenceResult], text: str, info: ModelInfo
) -> AsyncIterator[bytes]:
    """Write the results of a text as server-sent events."""
    sentences: list[SentenceResult] = []
    async with aclosing(results):  # type: ignore[type-var]
        async for result in results:
            if isinstance(result, Partial):
                yield event("partial", {"sentence": result.sentence, "text": result.text})
            else:
                sentences.append(result)
                yield event("sentence", {"index": len(sentences) - 1, **sentence_json(result)})
    whole = text_result(clean(text), sentences)
    update = newest(sentences, info)
    yield event("done", {"text": whole.text, "gaps": whole.gaps, "model": info.name, "update": update})


def event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + dumps(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events, of which the first is known; if the client leaves, the generator is closed at once."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncIterator[bytes]) -> None:
        super().__init__(headers=NO_STORE)
        del self.headers["content-length"]
        self.first, self.events = first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.events):  # type: ignore[type-var]
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await send({"type": "http.response.body", "body": self.first, "more_body": True})
                async for written in self.events:
                    await send({"type": "http.response.body", "body": written, "more_body": True})
            except (ServiceError, UserError) as error:
                failed = b"event: error\ndata: " + bytes(error_answer(error).body) + b"\n\n"
                await send({"type": "http.response.body", "body": failed, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
