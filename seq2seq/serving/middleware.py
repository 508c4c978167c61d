"""What every request passes first: records and headers, the sender's address, the size of the body, its disconnection.

Plain ASGI, which adds only microseconds to a request; `scope`, `receive` and `send` are those of the standard.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Iterable
from urllib.parse import quote, urlsplit

import anyio
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seq2seq.serving.answers import ClientGone, Refused, error_answer
from seq2seq.serving.metrics import Metrics

LOG = logging.getLogger("seq2seq.serving")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
CLOSE = {"connection": "close"}  # nothing more is read from this client
GONE = 499  # in records and metrics, as in nginx: the client left first
OTHER = "other"  # the route of every path that does not exist
READ_ON = 16  # times the limit is read before an answer: few clients read one while they still send
READ_ONLY = ("GET", "HEAD", "OPTIONS")


def header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


class Observer:
    """Count, time and record each request; add the security headers; an unforeseen error becomes a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, size = time.perf_counter(), 0, 0

        async def observed(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *SECURITY_HEADERS]}
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except ClientGone:
            status = GONE
        except Exception:
            LOG.exception("error in %s %s", scope["method"], quote(scope["path"]))
            if not status:
                await error_answer(Refused(500, "internal error; the server's log explains it"))(
                    scope, receive, observed
                )
        finally:
            self.record(scope, status or GONE, time.perf_counter() - began, size)

    def record(self, scope: Scope, status: int, seconds: float, size: int) -> None:
        path = scope["path"]
        self.metrics.observe(path if path in self.routes else OTHER, status, seconds)
        if LOG.isEnabledFor(logging.INFO):
            body: BaseModel | None = scope.get("seq2seq.body")
            texts = " " + body.model_dump_json(exclude={"api_key"}, exclude_unset=True) if body else ""
            line = f"{scope['method']} {quote(path)} {status} {1000 * seconds:.1f} ms"
            LOG.info("%s in %d out %d bytes%s", line, scope.get("seq2seq.bytes", 0), size, texts)


class AddressCheck:
    """Refuse requests that another web page makes a browser send: by their Host (DNS rebinding), by their Origin.

    A server on a loopback address answers only to loopback names and to the hosts of `origins`.
    """

    def __init__(self, app: ASGIApp, host: str, origins: Iterable[str]) -> None:
        self.app, self.origins = app, frozenset(origins)
        self.local = is_loopback(host)
        self.hosts = {urlsplit(origin).hostname for origin in self.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self.refusal(scope) if scope["type"] == "http" else None
        await (error_answer(refused) if refused else self.app)(scope, receive, send)

    def refusal(self, scope: Scope) -> Refused | None:
        host, origin = header(scope, b"host"), header(scope, b"origin")
        name = host_name(host)
        if self.local and name and name not in self.hosts and not is_loopback(name):
            remedy = f"if a proxy serves it, add its origin, such as https://{name}, to cors"
            return Refused(400, f"host: {host!r} is not a name of this server; {remedy}")
        foreign = origin and origin not in self.origins and "*" not in self.origins
        if foreign and scope["method"] not in READ_ONLY and origin.partition("://")[2] != host:
            return Refused(403, f"origin: {origin!r} may not send requests; add it to cors")
        return None


def host_name(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return host


def is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


class BodyLimit:
    """Read a body of at most `most` bytes within `seconds`, then cancel the request if its client leaves."""

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self.app, self.most, self.seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READ_ONLY:
            await self.app(scope, receive, send)
            return
        try:
            body = await self.read(scope, receive)
        except Refused as refused:
            await error_answer(refused)(scope, receive, send)
            return
        scope["seq2seq.bytes"] = len(body)
        await serve_while_connected(self.app, body, scope, receive, send)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        too_large = Refused(413, f"body: it exceeds this server's limit of {self.most:,} bytes; send less", CLOSE)
        declared, most_read = declared_length(scope), READ_ON * self.most
        if declared > most_read or (declared > self.most and header(scope, b"expect")):
            raise too_large
        body, size, more = bytearray(), 0, True
        try:
            with anyio.fail_after(self.seconds):
                while more and size <= most_read:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size <= self.most:
                        body += piece
        except TimeoutError:
            raise Refused(408, f"body: it did not arrive within {self.seconds:g} s", CLOSE) from None
        if size > self.most:
            raise too_large
        return bytes(body)


def declared_length(scope: Scope) -> float:
    length = header(scope, b"content-length")
    return float(length) if length.isdecimal() else 0


async def serve_while_connected(app: ASGIApp, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the application on a body; it is cancelled when its client leaves."""
    request, left, complete = asyncio.current_task(), asyncio.Event(), False
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        if request and not complete:
            request.cancel()

    async def replay() -> Message:
        if not unread:
            await left.wait()
        return unread.pop() if unread else {"type": "http.disconnect"}

    async def tracked(message: Message) -> None:
        nonlocal complete
        complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await send(message)

    watcher = asyncio.create_task(watch())
    try:
        await app(scope, replay, tracked)
    except asyncio.CancelledError:
        if not left.is_set():
            raise
        raise ClientGone from None
    finally:
        watcher.cancel()
