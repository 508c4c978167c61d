"""The web application: both APIs, the page, and what guards them."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from seq2seq.config.schema import ServeConfig
from seq2seq.serving.answers import Refused, error_answer
from seq2seq.serving.assets import DOCS, INDEX, assets
from seq2seq.serving.bodies import Api
from seq2seq.serving.interface import ServiceError
from seq2seq.serving.libretranslate import LibreTranslate
from seq2seq.serving.metrics import CONTENT_TYPE, Metrics
from seq2seq.serving.middleware import OTHER, AddressCheck, BodyLimit, Observer
from seq2seq.serving.openapi import new_app, route
from seq2seq.serving.service import Service
from seq2seq.serving.v1 import V1
from seq2seq.utils.errors import UserError

CHANGES = {"cache-control": "no-cache"}  # a browser asks again, so that no page mixes two versions
BODY_SECONDS = 20.0  # for a body to arrive


def create_app(service: Service, config: ServeConfig) -> FastAPI:
    """Return the application that serves a service over HTTP."""
    app = new_app()
    metrics = Metrics()
    V1(service, config).add_to(app.router)
    LibreTranslate(service, config).add_to(app.router)
    MetricsRoute(service, config, metrics).add_to(app.router)
    add_page(app)
    for error in (Refused, ServiceError, UserError):
        app.add_exception_handler(error, answer_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, most=config.max_body_bytes, seconds=min(BODY_SECONDS, config.timeout_s))
    if config.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors, allow_methods=["GET", "POST"], allow_headers=["Authorization"]
        )
    app.add_middleware(AddressCheck, host=config.host, origins=config.cors)
    routes = frozenset(getattr(one, "path", OTHER) for one in app.routes)
    app.add_middleware(Observer, metrics=metrics, routes=routes)
    return app


class MetricsRoute(Api):
    def __init__(self, service: Service, config: ServeConfig, metrics: Metrics) -> None:
        super().__init__(service, config)
        self.metrics = metrics

    def add_to(self, router: APIRouter) -> None:
        route(router, "GET", "/metrics", self.answer, tag="seq2seq", media="text/plain")

    async def answer(self, request: Request) -> Response:
        """Return counters and histograms in Prometheus' text format."""
        self.authorize(request)
        text = self.metrics.render(self.service.stats(), self.service.models.values())
        return Response(text, media_type=CONTENT_TYPE)


def add_page(app: FastAPI) -> None:
    """Add the page, the description of the API and their files, which are read once."""
    for name, (content, media) in assets().items():
        add_file(app, f"/static/{name}", content, media)
    add_file(app, "/", INDEX.read_bytes(), "text/html")
    add_file(app, "/docs", DOCS.read_bytes(), "text/html")


def add_file(app: FastAPI, path: str, content: bytes, media: str) -> None:
    async def answer(request: Request) -> Response:
        return Response(content, headers=CHANGES, media_type=media)

    app.add_route(path, answer, include_in_schema=False)


async def answer_error(request: Request, error: Exception) -> Response:
    return error_answer(error)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"{path}: no such path; GET /docs lists them",
        405: f"{path}: {request.method} is not possible; GET /docs lists the methods",
    }.get(error.status_code, error.detail)
    return error_answer(Refused(error.status_code, message, error.headers))
