"""Laws of every route: headers, errors, keys, limits, records; what is sent by other pages or by clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from seq2seq.serving import app as app_module
from seq2seq.serving import middleware
from seq2seq.serving.interface import Busy, Closing, TimedOut, TooLarge, UnknownModel, WorkerLost
from seq2seq.serving.middleware import CSP
from seq2seq.utils.errors import UserError
from tests.helpers.serving import FakeService, Web, running

PAIR = {"source": "en", "target": "de"}
BODIES: dict[str, Any] = {
    "/v1/translate": {"text": "A dog"},
    "/v1/stream": {"text": "A dog"},
    "/v1/score": {"source": ["A"], "target": ["B"]},
    "/v1/alternatives": {"text": "A"},
    "/v1/attention": {"text": "A"},
    "/v1/reload": {},
    "/translate": {"q": "A", **PAIR},
    "/detect": {"q": "A"},
}
OPEN = {"/", "/docs", "/openapi.json", "/health", "/languages", "/frontend/settings", "/suggest"}
KEYED = {*BODIES, "/v1/models", "/v1/search", "/metrics"}


def ask(web: Web, path: str, **arguments: Any) -> Any:
    return web.post(path, BODIES[path], **arguments) if path in BODIES else web.get(path, **arguments)


def scope_of(path: str, **headers: str) -> dict[str, Any]:
    given = {"host": "127.0.0.1", "content-type": "application/json", **headers}
    return {
        **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "root_path": ""},
        **{"query_string": b"", "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)},
        **{"http_version": "1.1", "asgi": {"version": "3.0"}},
        "headers": [(key.replace("_", "-").encode(), value.encode()) for key, value in given.items()],
    }


def asgi(web: Web, path: str, receive: Callable[[], Awaitable[dict[str, Any]]], **headers: str) -> list[dict[str, Any]]:
    """Send one POST whose body comes from `receive`; return the messages of the answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(asyncio.wait_for(web.app(scope_of(path, **headers), receive, send), 10))
    return sent


def error_of(sent: list[dict[str, Any]]) -> tuple[int, str]:
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]


# ------------------------------------------------------------------------------------------------- routes


def test_every_route_answers() -> None:
    web = Web()
    documented = {path for path in web.get("/openapi.json").json()["paths"]}
    assert documented == (KEYED | OPEN) - {"/", "/docs", "/openapi.json"}
    for path in sorted(documented - {"/suggest"} | {"/", "/docs"}):
        assert ask(web, path).status_code == 200, path


def test_every_answer_has_the_security_headers() -> None:
    service = FakeService()
    service.failure = RuntimeError()
    web = Web()
    answers = [ask(web, path) for path in sorted(KEYED | OPEN - {"/suggest"})]
    answers += [web.get("/none"), web.get("/translate"), Web(service).post("/translate", BODIES["/translate"])]
    answers += [Web(max_body_bytes=1).post("/detect", {"q": "A"}), web.get("/health", headers={"host": "evil.com"})]
    answers += [web.post("/detect", headers={"origin": "http://b.com"})]
    answers += [Web(cors=["http://a.com"]).request("OPTIONS", "/detect", headers={"origin": "http://b.com"})]
    for answer in answers:
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
    assert {answer.status_code for answer in answers} >= {200, 404, 405, 500, 413, 400, 403}


def test_what_can_be_read_has_a_head() -> None:
    """HEAD answers as GET does, without being described as a route of its own."""
    for path in sorted((KEYED | OPEN) - {*BODIES, "/suggest", "/metrics", "/openapi.json"}):
        head, whole = Web().request("HEAD", path), Web().get(path)
        assert (head.status_code, head.headers) == (200, whole.headers), path


def test_a_path_or_method_that_does_not_exist_is_explained() -> None:
    for answer, status in ((Web().get("/none"), 404), (Web().get("/translate"), 405), (Web().post("/languages"), 405)):
        assert answer.status_code == status
        assert "/docs" in answer.json()["error"]
    assert Web().get("/translate").headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["/static/none.js", "/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/"]
)
def test_no_path_reaches_the_disk(path: str) -> None:
    assert Web().get(path).status_code == 404


def test_the_files_of_the_page_have_their_types() -> None:
    for path, media in (("/", "text/html"), ("/docs", "text/html"), ("/static/api.js", "text/javascript")):
        answer = Web().get(path)
        assert answer.headers["content-type"] == f"{media}; charset=utf-8"
        assert answer.headers["cache-control"] == "no-cache"


def test_pages_load_nothing_from_elsewhere_and_contain_no_script() -> None:
    for path in ("/", "/docs"):
        page = Web().get(path).text
        assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*src=)", page)
        for file in re.findall(r'(?:src|href)="(static/[^"]+)"', page):
            assert Web().get(f"/{file}").status_code == 200, file


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (UserError("search.require: 'x' cannot be written"), 400, None),
        (UnknownModel("no model x"), 404, None),
        (TooLarge("2,001 sentences"), 413, None),
        (Busy(2.1), 429, "3"),
        (Busy(0.0), 429, "1"),
        (Closing(4), 503, "4"),
        (WorkerLost("the worker died"), 503, "1"),
        (TimedOut("60 s have passed"), 504, None),
    ],
)
def test_what_the_service_raises_has_its_status(failure: Exception, status: int, retry: str | None) -> None:
    service = FakeService()
    service.failure = failure
    web = Web(service)
    for path in sorted({*BODIES} - {"/detect"}):
        answer = ask(web, path)
        assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry), path
        assert answer.json() == {"error": str(failure)}


def test_an_unforeseen_error_shows_nothing_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()
    service.failure = RuntimeError("a secret of the server")
    answer = Web(service).post("/v1/translate", {"text": "a"})
    assert answer.status_code == 500
    assert "secret" not in answer.text and list(answer.json()) == ["error"]
    assert "a secret of the server" in caplog.text  # its log has the traceback


# ------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("path", sorted(KEYED))
def test_a_key_is_needed_for_what_costs_or_tells(path: str) -> None:
    web = Web(api_key="schlüssel")
    wrong = ("Bearer x", "Bearer schlüsse", "Bearer schlüssell", "Bearer SCHLÜSSEL")
    for given, message in (
        {"": "missing;", "Bearer ": "missing;", "Basic schlüssel": "missing;"} | dict.fromkeys(wrong, "wrong")
    ).items():
        answer = ask(web, path, headers={"authorization": given.encode()} if given else {})
        assert (answer.status_code, answer.json()["error"].split()[:2]) == (403, ["api_key:", message])
    assert web.service.calls == []
    for kind in ("Bearer", "bearer"):
        assert ask(web, path, headers={"authorization": f"{kind} schlüssel".encode()}).status_code == 200
    if path in BODIES:
        assert web.post(path, {**BODIES[path], "api_key": "schlüssel"}).status_code == 200
        assert web.post(path, {**BODIES[path], "api_key": "x"}).status_code == 403


def test_a_key_is_not_needed_to_see_the_page() -> None:
    for path in sorted(OPEN - {"/suggest"}):
        assert Web(api_key="k").get(path).status_code == 200


def test_without_a_key_any_key_is_accepted() -> None:
    """Clients of LibreTranslate send an empty key, or one for another server."""
    for key in ("", "x"):
        assert Web().post("/translate", data={"q": "A", **PAIR, "api_key": key}).status_code == 200


# ------------------------------------------------------------------------------------------------- other web pages


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        *((name, True) for name in ("127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "a.localhost")),
        *((name, False) for name in ("evil.com", "evil.com:8000", "127.0.0.1.evil.com", "192.168.1.2", "[::1", "a@b")),
    ],
)
def test_a_local_server_answers_to_local_names_only(host: str, accepted: bool) -> None:
    answer = Web().get("/health", headers={"host": host})
    assert answer.status_code == (200 if accepted else 400)
    assert accepted or "cors" in answer.json()["error"]
    assert Web(host="0.0.0.0").get("/health", headers={"host": host}).status_code == 200
    assert Web(cors=["https://evil.com"]).get("/health", headers={"host": "evil.com"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.com", "null", "http://127.0.0.1:81", "http://127.0.0.1.evil.com"])
def test_another_page_sends_no_requests(origin: str) -> None:
    web = Web()
    answer = web.post("/translate", data=BODIES["/translate"], headers={"origin": origin})
    assert (answer.status_code, web.service.calls) == (403, [])
    assert "access-control-allow-origin" not in answer.headers
    same = web.post("/translate", BODIES["/translate"], headers={"origin": "http://127.0.0.1"})
    assert same.status_code == 200


def test_an_allowed_origin_sends_requests() -> None:
    web = Web(cors=["https://a.com"])
    answer = web.post("/translate", BODIES["/translate"], headers={"origin": "https://a.com"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://a.com")
    preflight = {"origin": "https://a.com", "access-control-request-method": "POST"}
    preflight["access-control-request-headers"] = "content-type,authorization"
    assert web.request("OPTIONS", "/translate", headers=preflight).status_code == 200
    assert web.request("OPTIONS", "/translate", headers={**preflight, "origin": "https://b.com"}).status_code == 400
    assert Web(cors=["*"]).post("/detect", {"q": "A"}, headers={"origin": "https://b.com"}).status_code == 200


# ------------------------------------------------------------------------------------------------- bodies


def test_a_body_of_the_limit_is_accepted_and_one_byte_more_is_not() -> None:
    body = json.dumps({"text": "A dog"}).encode()
    headers = {"content-type": "application/json"}
    assert Web(max_body_bytes=len(body)).post("/v1/translate", content=body, headers=headers).status_code == 200
    answer = Web(max_body_bytes=len(body) - 1).post("/v1/translate", content=body, headers=headers)
    assert answer.status_code == 413
    assert f"{len(body) - 1:,} bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers", [{"content_length": "1001", "expect": "100-continue"}, {"content_length": "9" * 5000}]
)
def test_a_length_far_over_the_limit_is_refused_unread(headers: dict[str, str]) -> None:
    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is read")

    assert error_of(asgi(Web(max_body_bytes=1000), "/v1/translate", receive, **headers))[0] == 413


def test_an_endless_body_is_not_read_on_for_ever() -> None:
    received = 0

    async def receive() -> dict[str, Any]:
        nonlocal received
        received += 100
        return {"type": "http.request", "body": b" " * 100, "more_body": True}

    sent = asgi(Web(max_body_bytes=1000), "/v1/translate", receive)
    assert error_of(sent)[0] == 413 and received == 1000 * middleware.READ_ON + 100
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_body_may_arrive_in_pieces() -> None:
    pieces = [bytes([byte]) for byte in json.dumps({"text": "A dog"}).encode()]

    async def receive() -> dict[str, Any]:
        if not pieces:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    assert asgi(Web(), "/v1/translate", receive)[0]["status"] == 200


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    assert error_of(asgi(Web(timeout_s=0.01), "/v1/translate", receive))[0] == 408


# ------------------------------------------------------------------------------------------------- clients that leave


def leaving(web: Web, path: str, ready: Callable[[], bool]) -> list[dict[str, Any]]:
    """Send a request whose client leaves as soon as the service is ready."""
    body = [json.dumps(BODIES[path]).encode()]

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        while not ready():
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    return asgi(web, path, receive)


@pytest.mark.parametrize("path", sorted({*BODIES}))
def test_the_request_of_a_client_that_left_is_cancelled(path: str) -> None:
    web = Web()
    web.service.waiting = asyncio.Event()
    assert leaving(web, path, lambda: bool(web.service.calls)) == []
    assert web.service.cancelled == 1
    assert f'requests_total{{route="{path}",status="499"}} 1' in web.get("/metrics").text


def test_a_stream_stops_when_its_client_leaves() -> None:
    web = Web()
    web.service.endless = True
    sent = leaving(web, "/v1/stream", lambda: len(web.service.calls) == 1)
    assert web.service.closed == 1
    assert not sent or sent[-1].get("more_body", True)


def test_a_stream_stops_while_it_waits_for_its_client() -> None:
    """A client that reads no more holds up `send`; the generator is then closed at once, not when it is collected."""
    web, events = Web(), iter(range(3))
    web.service.endless = True
    body = [json.dumps(BODIES["/v1/stream"]).encode()]
    stuck = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await stuck.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if next(events, None) is None:
            stuck.set()
            await asyncio.Event().wait()

    async def closed_at_the_end() -> int:
        await web.app(scope_of("/v1/stream"), receive, send)
        return web.service.closed

    assert asyncio.run(closed_at_the_end()) == 1


def test_a_client_that_leaves_before_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    web = Web()
    assert asgi(web, "/v1/translate", receive) == []
    assert (web.service.calls, caplog.records) == ([], [])


def test_an_answer_is_complete_though_its_client_leaves_afterwards() -> None:
    web = Web()
    sent = leaving(web, "/v1/translate", lambda: False)
    assert sent[-1]["type"] == "http.response.body" and web.service.cancelled == 0


# ------------------------------------------------------------------------------------------------- records


def test_records_hold_sizes_and_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="seq2seq.serving")
    body = {"text": "private words", "api_key": "secret"}
    answer = Web().post("/v1/translate", body)
    (record,) = caplog.messages
    sizes = f"in {len(answer.request.content)} out {len(answer.content)} bytes"
    assert re.fullmatch(rf"POST /v1/translate 200 \d+\.\d ms {sizes}", record)
    caplog.clear()
    Web(log_texts=True).post("/v1/translate", body)
    assert "private words" in caplog.text and "secret" not in caplog.text


def test_a_path_cannot_forge_a_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="seq2seq.serving")
    Web().get("/a%0aGET%20/b")
    (record,) = caplog.messages
    assert "\n" not in record


# ------------------------------------------------------------------------------------------------- description


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_every_route_is_described() -> None:
    description = Web().get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert references(description) <= {f"#/components/schemas/{name}" for name in schemas}
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert operation["description"] and operation["tags"], path
            assert "422" not in operation["responses"], path
            assert (method == "post" and path != "/suggest") == ("requestBody" in operation), path
            for status, answer in operation["responses"].items():
                assert answer["description"] and (status == "200" or answer["content"]), path


def test_the_examples_of_the_description_work() -> None:
    web = Web()
    description = web.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    for path, methods in description["paths"].items():
        for content in methods.get("post", {}).get("requestBody", {}).get("content", {}).values():
            fields = schemas[content["schema"]["$ref"].rpartition("/")[2]]["properties"]
            body = {name: field["examples"][0] for name, field in fields.items() if "examples" in field}
            assert web.post(path, body).status_code == 200, path


# ------------------------------------------------------------------------------------------------- a real server


@pytest.mark.slow
def test_a_real_client_that_leaves_is_forgotten() -> None:
    service = FakeService()
    service.waiting = asyncio.Event()
    body = json.dumps({"text": "A"})
    with running(Web(service).app) as address:
        url = urlsplit(address)
        with socket.create_connection((url.hostname or "", url.port or 0)) as connection:
            head = f"POST /v1/translate HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: bool(service.calls))
        wait_for(lambda: service.cancelled == 1)


@pytest.mark.slow
def test_a_real_client_reads_that_its_upload_was_too_large() -> None:
    with running(Web(max_body_bytes=1000).app) as address:
        client = http.client.HTTPConnection(urlsplit(address).netloc)
        chunks = (b" " * 500 for _ in range(10))
        client.request("POST", "/translate", chunks, {"Content-Type": "application/json"}, encode_chunked=True)
        assert client.getresponse().status == 413


@pytest.mark.slow
def test_a_connection_serves_many_requests() -> None:
    with running(Web().app) as address:
        client = http.client.HTTPConnection(urlsplit(address).netloc)
        for n in range(20):
            client.request("POST", "/detect", json.dumps({"q": f"{n}"}), {"Content-Type": "application/json"})
            assert client.getresponse().read() == b'[{"confidence":100.0,"language":"en"}]'
            connection = client.sock
        assert client.sock is connection


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_a_slow_body_has_its_own_limit() -> None:
    """The time for a body is short, however long a request may take."""
    (seconds,) = [
        layer.kwargs["seconds"] for layer in Web(timeout_s=3600).app.user_middleware if "most" in layer.kwargs
    ]
    assert seconds == app_module.BODY_SECONDS
