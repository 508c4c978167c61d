"""The protocol of LibreTranslate at the root, so that its clients work unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError

from seq2seq.config.schema import SearchConfig
from seq2seq.serving.answers import Refused, json_answer
from seq2seq.serving.bodies import Api, B, problems
from seq2seq.serving.interface import ModelInfo, TextResult
from seq2seq.serving.markup import joined_markup, split_markup
from seq2seq.serving.openapi import route
from seq2seq.serving.schemas import DetectBody, Detected, Health, Language, LibreTranslateAnswer, LibreTranslateBody

AUTO = "auto"
FORMATS = ("text", "html")
DETECTED_CHARACTERS = 500  # the beginning of a text, which detection reads
# English names of codes that runs often carry; another code stands for itself.
NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fi": "Finnish", "fr": "French", "he": "Hebrew"},
    **{"hi": "Hindi", "hu": "Hungarian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian"},
    **{"lv": "Latvian", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian"},
    **{"ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sv": "Swedish", "tr": "Turkish", "uk": "Ukrainian"},
    **{"vi": "Vietnamese", "zh": "Chinese"},
}


class LibreTranslate(Api):
    forms = True
    of_error = "Invalid request: "

    def add_to(self, router: APIRouter) -> None:
        add = partial(route, router, tag="LibreTranslate")
        add("POST", "/translate", self.translate, LibreTranslateBody, LibreTranslateAnswer, forms=True)
        add("POST", "/detect", self.detect, DetectBody, list[Detected], forms=True)
        add("GET", "/languages", self.languages, answer=list[Language], errors=())
        add("GET", "/frontend/settings", self.settings, answer=dict[str, Any], errors=())
        add("POST", "/suggest", self.suggest, errors=(403,))
        add("GET", "/health", self.health, answer=Health, errors=(503,))

    async def translate(self, request: Request) -> Response:
        """Translate one text or several.

        With the source `auto`, the model for the target language whose alphabet and subwords fit best translates; see
        /detect. Alternatives are the next translations of a text's sentences, joined. In HTML, tags and the contents
        of script, style, pre, code and elements with translate="no" stay; the text between two tags is translated by
        itself.
        """
        body = await self.read(request, LibreTranslateBody)
        texts = [body.q] if isinstance(body.q, str) else body.q
        detected, model = await self.choose(body, texts)
        translated, alternatives = await self.translated(texts, body, model.name)
        one = isinstance(body.q, str)
        answer: dict[str, Any] = {"translatedText": translated[0] if one else translated}
        if detected:
            answer["detectedLanguage"] = detected if one else [detected] * len(texts)
        if body.alternatives:
            answer["alternatives"] = alternatives[0] if one else alternatives
        return json_answer(answer)

    async def translated(
        self, texts: list[str], body: LibreTranslateBody, model: str
    ) -> tuple[list[str], list[list[str]]]:
        """Return the translation of each text, and its alternatives."""
        if body.format == "html":
            return await self.translated_pages(texts, model), [[] for _ in texts]
        search = with_alternatives(self.service.search, body.alternatives)
        found = await self.service.translate(texts, model=model, search=search, probabilities=False)
        return [result.text for result in found], [alternatives_of(result, body.alternatives) for result in found]

    async def translated_pages(self, texts: list[str], model: str) -> list[str]:
        pages = [split_markup(text) for text in texts]
        parts = [piece.text for page in pages for piece in page if piece.translatable]
        results = iter(await self.service.translate(parts, model=model, probabilities=False))
        return [joined_markup(page, [next(results).text for piece in page if piece.translatable]) for page in pages]

    async def choose(self, body: LibreTranslateBody, texts: list[str]) -> tuple[dict[str, Any] | None, ModelInfo]:
        """Return the detected language, if the request asks for it, and the model to translate with."""
        source, target = body.source.lower(), body.target.lower()
        models = list(self.service.models.values())
        sources, targets = {AUTO, *(m.source.lower() for m in models)}, {m.target.lower() for m in models}
        for code, known in ((source, sources), (target, targets)):
            if code not in known:
                raise Refused(400, f"{code} is not supported")
        fitting = [m for m in models if m.target.lower() == target and source in (AUTO, m.source.lower())]
        if not fitting:
            raise Refused(400, f"{body.target} is not available as a target language from {body.source}")
        if source != AUTO:
            return None, fitting[0]
        best = (await self.detected(" ".join(texts), fitting))[0]
        return best, next(m for m in fitting if m.source == best["language"])

    async def detect(self, request: Request) -> Response:
        """Rank the source languages of the models by how well each can read the text.

        The confidence is the share of the text's characters, from 0 to 100, that the subwords of the language's model
        can spell, times the mean length of these subwords relative to the language with the longest. It compares
        alphabets and subwords, not languages: with one model, every text in its alphabet gets a high confidence.
        """
        body = await self.read(request, DetectBody)
        text = body.q if isinstance(body.q, str) else " ".join(body.q)
        return json_answer(await self.detected(text, list(self.service.models.values())))

    async def detected(self, text: str, models: Sequence[ModelInfo]) -> list[dict[str, Any]]:
        """Return each source language of the models with its confidence, best first."""
        text = text.strip()[:DETECTED_CHARACTERS]
        by_language = {model.source: model.name for model in reversed(models)}
        readings = {}
        for language, model in by_language.items():
            # An empty target is the cheapest way to learn how a model reads a source.
            pieces = (await self.service.score([text], [""], model=model))[0].source_pieces if text else ()
            readings[language] = reading(text, pieces)
        longest = max(length for _, length in readings.values()) or 1.0
        ranked = sorted(readings.items(), key=lambda item: -item[1][0] * item[1][1])
        return [
            {"confidence": round(100 * known * length / longest, 1), "language": language}
            for language, (known, length) in ranked
        ]

    async def languages(self, request: Request) -> Response:
        """List the source languages, each with the languages that it can be translated into."""
        targets: dict[str, list[str]] = {}
        for model in self.service.models.values():
            codes = targets.setdefault(model.source, [])
            if model.target not in codes:
                codes.append(model.target)
        return json_answer([{**language(code), "targets": codes} for code, codes in targets.items()])

    async def settings(self, request: Request) -> Response:
        """Return what frontends of LibreTranslate read first."""
        model = next(iter(self.service.models.values()))
        return json_answer(
            {
                "charLimit": self.config.max_characters,
                "frontendTimeout": 500,
                "apiKeys": bool(self.key),
                "keyRequired": bool(self.key),
                "suggestions": False,
                "filesTranslation": False,
                "supportedFilesFormat": [],
                "language": {"source": language(model.source), "target": language(model.target)},
            }
        )

    async def suggest(self, request: Request) -> Response:
        """Suggestions are not stored: the answer is always an error."""
        raise Refused(403, "Suggestions are disabled on this server.")

    async def health(self, request: Request) -> Response:
        """Say that the server accepts requests and has a worker for them."""
        self.service.check_health()
        return json_answer({"status": "ok"})

    def parse(self, request: Request, raw: bytes, model: type[B]) -> B:
        """Check the fields in the words of LibreTranslate where it has its own."""
        body = super().parse(request, raw, model)
        for name in ("q", "source", "target"):
            if not getattr(body, name, True):
                raise Refused(400, f"Invalid request: missing {name} parameter")
        if isinstance(body, LibreTranslateBody) and body.format not in FORMATS:
            raise Refused(400, f"{body.format} format is not supported")
        return body

    def explained(self, error: ValidationError, model: type[BaseModel]) -> str:
        missing = [str(detail["loc"][0]) for detail in error.errors() if detail["type"] == "missing"]
        return f"missing {missing[0]} parameter" if missing else "; ".join(problems(error, model))


def language(code: str) -> dict[str, str]:
    return {"code": code, "name": NAMES.get(code.lower(), code)}


def reading(text: str, pieces: Sequence[str]) -> tuple[float, float]:
    """Return the share of the text's characters in known subwords, and the mean length of these."""
    known = [piece.replace("▁", "") for piece in pieces if not (piece.startswith("<") and piece.endswith(">"))]
    characters, spelled = len("".join(text.split())), sum(map(len, known))
    # A normaliser may lengthen a text, and marks what it reads twice as nothing unknown.
    return min(1.0, spelled / max(1, characters)), spelled / max(1, len(known))


def with_alternatives(search: SearchConfig, count: int) -> SearchConfig:
    """Widen the search, if need be, to one translation more than there are alternatives."""
    if not count:
        return search if search.n_best == 1 else replace(search, n_best=1)
    if search.samples:
        return replace(search, n_best=count + 1, samples=max(search.samples, count + 1))
    beam = max(search.beam, count + 1)
    return replace(search, n_best=count + 1, beam=-(-beam // search.groups) * search.groups)


def alternatives_of(result: TextResult, count: int) -> list[str]:
    """Return the next best texts, each different; a sentence with fewer translations repeats its last."""
    texts = [result.text]
    for rank in range(1, count + 1):
        chosen = [s.translations[min(rank, len(s.translations) - 1)].text for s in result.sentences]
        texts.append("".join(g + t for g, t in zip(result.gaps, [*chosen, ""], strict=True)))
    return list(dict.fromkeys(texts))[1:]
