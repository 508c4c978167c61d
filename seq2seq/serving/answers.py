"""Answers in JSON, and the errors that become one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from seq2seq.serving.interface import Busy, Closing, ServiceError, TimedOut, TooLarge, UnknownModel, WorkerLost
from seq2seq.utils.errors import UserError

STATUS: dict[type[Exception], int] = {
    UserError: 400,
    UnknownModel: 404,
    TooLarge: 413,
    Busy: 429,
    ServiceError: 500,
    WorkerLost: 503,
    Closing: 503,
    TimedOut: 504,
}

LONGEST = 1000  # characters of an error


class Refused(Exception):
    """A request that gets an error as its answer, before any model runs."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class ClientGone(Exception):
    """The client left before its answer was complete."""


def json_answer(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return plain values as a response in JSON, without another check of them."""
    return Response(dumps(value), status, headers, "application/json")


def error_answer(error: Exception) -> Response:
    """Return the response to an error that the client should read."""
    if isinstance(error, Refused):
        return json_answer({"error": shortened(str(error))}, error.status, error.headers)
    status = next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    message = "; ".join(error.problems) if isinstance(error, UserError) else str(error)
    return json_answer({"error": shortened(message) or HTTPStatus(status).phrase}, status, retry_headers(error, status))


def shortened(message: str) -> str:
    """Return the beginning of a message, which may quote as much as a body holds."""
    return message if len(message) <= LONGEST else f"{message[:LONGEST]}…"


def retry_headers(error: Exception, status: int) -> dict[str, str]:
    if status not in (429, 503):
        return {}
    return {"retry-after": str(max(1, math.ceil(getattr(error, "retry_after", 1))))}


def dumps(value: Any) -> bytes:
    """Return JSON in UTF-8; JSON has no infinity and no NaN, which become null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # an error may quote half of a surrogate pair


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
