"""The API's own description: every route with its body, its answer and its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from seq2seq import __version__
from seq2seq.serving import schemas

ABOUT = """Translate, score and explain with models trained by seq2seq.

Two APIs: the routes below `/v1` show all that a model knows; those at the root follow
[LibreTranslate](https://docs.libretranslate.com), so that its clients work unchanged.
An error answers `{"error": "…"}` in one line. A server with an API key wants `Authorization: Bearer KEY`, or the field
`api_key`.
"""
ERRORS = {
    400: "A field is missing or wrong, or the body is not JSON in UTF-8; the error names it.",
    403: "The API key is missing or wrong, or the origin of the web page is not allowed.",
    404: "There is no such model.",
    408: "The body arrived too slowly.",
    413: "The request exceeds a limit of the server, which the error names.",
    415: "The Content-Type is not supported.",
    429: "The queue is full; the header Retry-After says when to try again.",
    500: "An error of the server.",
    503: "The server is shutting down, or the process that worked on the request died; try again.",
    504: "The request took longer than the server allows.",
}
REFERRED: list[type[BaseModel]] = [
    *(schemas.TranslateBody, schemas.StreamBody, schemas.ScoreBody, schemas.AlternativesBody),
    *(schemas.AttentionBody, schemas.ReloadBody, schemas.LibreTranslateBody, schemas.DetectBody, schemas.Error),
]
REFERENCE = "#/components/schemas/{model}"
Handler = Callable[[Request], Awaitable[Response]]


def route(
    router: APIRouter,
    method: str,
    path: str,
    handler: Handler,
    body: type[BaseModel] | None = None,
    answer: Any = None,
    *,
    tag: str,
    forms: bool = False,
    media: str = "application/json",
    errors: tuple[int, ...] | None = None,
) -> None:
    """Add a handler, which reads the request itself, and describe its body and answers."""
    statuses = errors if errors is not None else tuple(ERRORS) if body else (403, 500)
    responses: dict[int | str, dict[str, Any]] = {
        status: {"description": ERRORS[status], "content": in_json(schemas.Error)} for status in statuses
    }
    responses[200] = {"model": answer} if answer else {"content": {media: {"schema": {"type": "string"}}}}
    responses[200]["description"] = "The answer."
    extra: dict[str, Any] = {}
    if body:
        kinds = ("application/json", "application/x-www-form-urlencoded") if forms else ("application/json",)
        required = any(field.is_required() for field in body.model_fields.values())
        extra["requestBody"] = {"content": in_json(body, *kinds), "required": required}
    router.add_api_route(
        path,
        handler,
        methods=[method],
        tags=[tag],
        response_model=None,
        response_class=Response,
        responses=responses,
        openapi_extra=extra,
    )
    if method == "GET":  # which includes HEAD in HTTP
        router.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)


def in_json(model: type[BaseModel], *kinds: str) -> dict[str, Any]:
    """Describe content of these media types by the schema of a model."""
    schema = {"$ref": REFERENCE.format(model=model.__name__)}
    return {kind: {"schema": schema} for kind in kinds or ("application/json",)}


class App(FastAPI):
    """FastAPI whose description also holds the models that it does not see: bodies, which routes read, and errors."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            described = super().openapi()
            _, referred = models_json_schema([(one, "validation") for one in REFERRED], ref_template=REFERENCE)
            components = described.setdefault("components", {})
            components["schemas"] = {**components.get("schemas", {}), **referred["$defs"]}
            bearer = {"type": "http", "scheme": "bearer", "description": "The server's API key, if it has one."}
            components["securitySchemes"] = {"key": bearer}
            described["security"] = [{}, {"key": []}]
        return self.openapi_schema or {}


def new_app() -> App:
    """Return an application without routes; its pages of FastAPI, which load scripts from elsewhere, are off."""
    return App(title="seq2seq", version=__version__, description=ABOUT, docs_url=None, redoc_url=None)
