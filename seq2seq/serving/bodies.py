"""Reading requests: a body becomes a checked object, or an error that names its field; the API key is compared."""

from __future__ import annotations

import hmac
import json
from itertools import islice
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from seq2seq.config.schema import ServeConfig
from seq2seq.serving.answers import Refused
from seq2seq.serving.service import Service
from seq2seq.utils.errors import nearest

B = TypeVar("B", bound=BaseModel)
FORM = "application/x-www-form-urlencoded"
WANTED = {
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
}
SHOWN = 60  # characters of a wrong value in its error
MOST_FIELDS = 100  # of a form
MOST_PROBLEMS = 5  # fields that an error names: a body may hold 100,000 wrong ones


class Api:
    """What the routes share: the service, its config, and how a request is read."""

    forms: ClassVar[bool] = False  # whether bodies may be forms
    of_error: ClassVar[str] = ""  # begins each error of a body

    def __init__(self, service: Service, config: ServeConfig) -> None:
        self.service, self.config = service, config
        self.key = (config.api_key or "").encode()

    async def read(self, request: Request, model: type[B], default: bytes = b"") -> B:
        """Return the body as an object, after its API key is found right."""
        body = self.parse(request, await request.body() or default, model)
        self.authorize(request, getattr(body, "api_key", None))
        if self.config.log_texts:
            request.scope["seq2seq.body"] = body
        return body

    def parse(self, request: Request, raw: bytes, model: type[B]) -> B:
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        form = self.forms and media == FORM
        if not form and media not in ("", "application/json"):
            accepted = f"application/json or {FORM}" if self.forms else "application/json"
            raise Refused(415, f"content-type: {media} is not supported; send {accepted}")
        try:
            text = raw.decode()
            return model.model_validate(form_fields(text)) if form else model.model_validate_json(text)
        except UnicodeDecodeError as error:
            raise Refused(400, f"body: not UTF-8 at byte {error.start}") from None
        except ValidationError as error:
            raise Refused(400, self.of_error + self.explained(error, model)) from None

    def explained(self, error: ValidationError, model: type[BaseModel]) -> str:
        return "; ".join(problems(error, model))

    def authorize(self, request: Request, key: str | None = None) -> None:
        """Refuse a request without the server's API key, in its body or in its Authorization header."""
        if not self.key:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1") if kind.lower() == "bearer" else (key or "").encode("utf-8", "replace")
        if not given:
            raise Refused(403, "api_key: missing; send it in this field or as Authorization: Bearer")
        if not hmac.compare_digest(given, self.key):
            raise Refused(403, "api_key: wrong key")


def form_fields(text: str) -> dict[str, str]:
    """Return the fields of a form; the first of several values counts."""
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MOST_FIELDS)
    except UnicodeDecodeError:
        raise Refused(400, "body: a field is not UTF-8") from None
    except ValueError:
        raise Refused(400, f"body: more than {MOST_FIELDS} fields") from None
    return dict(reversed(pairs))


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Describe each of the first wrong fields once, in the words of the config's errors."""
    by_field: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_field.setdefault(str(detail["loc"][0]) if detail["loc"] else "body", []).append(detail)
    return [described(field, details, model) for field, details in islice(by_field.items(), MOST_PROBLEMS)]


def described(field: str, details: list[ErrorDetails], model: type[BaseModel]) -> str:
    """Describe what is wrong with a field; of the types that it might have, the one that fits best speaks."""
    deepest = max(len(path_of(detail)) for detail in details)
    details = [detail for detail in details if len(path_of(detail)) == deepest]
    first, key = details[0], field + "".join(path_of(details[0])[1:])
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "extra_forbidden":
        return f"{key}: no such key{nearest(key, model.model_fields)}"
    if first["type"] == "json_invalid":
        return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "model_type":
        return f"{key}: {shown(first['input'])} is not a JSON object"
    wanted = list(dict.fromkeys(WANTED[detail["type"]] for detail in details if detail["type"] in WANTED))
    if wanted:
        return f"{key}: {shown(first['input'])} is not {' or '.join(wanted)}"
    return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}"


def path_of(detail: ErrorDetails) -> list[str]:
    """Return the field and, within it, the keys and positions; names of types are left out."""
    field, *rest = detail["loc"] or ("body",)
    return [str(field), *(f"[{part}]" for part in rest if isinstance(part, int))]


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
