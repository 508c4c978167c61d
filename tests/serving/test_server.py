"""`seq2seq serve` as a process: what it prints, how it ends, and clients that do not finish their requests."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from seq2seq.serving import server as module
from seq2seq.serving.server import Protocol, listen
from seq2seq.utils.errors import STOPPED, UserError
from tests.helpers.runs import saved_run

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")


class Running:
    """A server process, its address, and what it printed until it was ready."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "seq2seq", "serve", f"outputs={folder}", "run=a", "port=0", "processes=2"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command += ["precision=float32", *overrides]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8")
        assert self.process.stdout
        self.printed = ""
        while "stop " not in self.printed and (line := self.process.stdout.readline()):
            self.printed += line
        found = re.search(r"http://\S+", self.printed)
        self.address = found[0].replace("0.0.0.0", "127.0.0.1") if found else ""

    def translate(self, text: str) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"{self.address}/v1/translate", json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def descendants(self) -> list[int]:
        """The processes below it, workers and what starts them."""
        parents = {int(p.name): stat_of(p) for p in Path("/proc").iterdir() if p.name.isdecimal()}
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]


def stat_of(process: Path) -> int:
    with suppress(OSError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def served(app: Any, client: Callable[[Any], Awaitable[None]]) -> None:
    """Let a client use an application that runs in the server's protocol."""

    async def run() -> None:
        server = uvicorn.Server(uvicorn.Config(app, http=Protocol, lifespan="off", log_config=None))
        with listen("127.0.0.1", 0) as listener:
            serving = asyncio.ensure_future(server.serve([listener]))
            await client(listener.getsockname())
            server.should_exit = True
            await serving

    asyncio.run(run())


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved_run(tmp_path_factory.getbasetemp() / "served" / "a", "transformer")
    return tmp_path_factory.getbasetemp() / "served"


@pytest.fixture
def running(outputs: Path) -> Iterator[Running]:
    server = Running(outputs)
    yield server
    server.process.kill()
    server.process.communicate()


@posix
@pytest.mark.slow
def test_a_server_answers_what_it_accepted_and_ends(running: Running) -> None:
    """After SIGTERM new requests get 503 until those before are answered; the exit code is 0."""
    assert re.match(r"serving    http://127\.0\.0\.1:\d+  \(2 workers; torch float32; beam 5\)", running.printed)
    assert "model      a: und → und, transformer" in running.printed
    answers: list[tuple[int, Any]] = []
    sentences = 1500  # seconds of work, so that it lasts beyond the late request on a fast machine too
    clients = [
        threading.Thread(target=lambda: answers.append(running.translate("Dogs see cats. " * sentences))) for _ in "ab"
    ]
    for client in clients:
        client.start()
    time.sleep(0.3)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    late, body = running.translate("Dogs")
    for client in clients:
        client.join()
    assert [status for status, _ in answers] == [200, 200]
    assert all(len(answer["results"][0]["sentences"]) == sentences for _, answer in answers)
    assert late == 503 and "shutting down" in body["error"]
    assert running.process.wait(20) == 0


@posix
@pytest.mark.slow
def test_a_second_signal_ends_a_server_at_once(running: Running) -> None:
    """What it accepted is cut off or refused; the log has no traceback."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(OSError, ValueError):  # a connection that ends
            answers.append(running.translate("Dogs see cats. " * 1900)[0])

    client = threading.Thread(target=ask)
    client.start()
    time.sleep(0.5)
    for _ in range(2):
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    began = time.monotonic()
    _, errors = running.process.communicate(timeout=20)
    client.join()
    assert time.monotonic() - began < 10 and running.process.returncode == STOPPED
    assert not re.search("Traceback|never retrieved", errors) and set(answers) <= {503}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are listed by /proc, on Linux only")
@pytest.mark.slow
def test_a_killed_server_leaves_no_process(running: Running) -> None:
    children = running.descendants()
    assert len(children) >= 3
    running.process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.1)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("host", "port", "message"), [("no.such.host.invalid", 0, "host: no.such"), ("127.0.0.1", 1, "")]
)
def test_an_address_that_cannot_be_used_is_one_line(host: str, port: int, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        with pytest.raises(UserError) as error:
            listen(host, used if port else 0).close()
    assert str(error.value).startswith(message or f"port: cannot listen on 127.0.0.1:{used} (Address already in use)")
    assert "\n" not in str(error.value)


def test_a_request_whose_head_takes_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the second one of a connection; one whose head is complete may take its time."""
    monkeypatch.setattr(module, "HEADER_SECONDS", 0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.25)
        await answer_ok(scope, receive, send)

    async def client(address: Any) -> None:
        for beginning in (b"", REQUEST):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(beginning)
            if beginning:
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            writer.write(REQUEST[:16])
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    served(app, client)


@pytest.mark.parametrize("pause", [0, 0.3])
def test_a_client_that_does_not_read_its_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch, pause: float) -> None:
    """What it has not read fills memory; one that reads now and then gets everything, however long it takes."""
    monkeypatch.setattr(module, "READ_SECONDS", 0.1)
    size = 20_000_000

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def client(address: Any) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_connection(address) as connection:
            connection.setblocking(False)
            await loop.sock_sendall(connection, REQUEST)
            await asyncio.sleep(pause)
            received = 0
            with suppress(ConnectionError):
                while data := await loop.sock_recv(connection, 2**20):
                    received += len(data)
                    await asyncio.sleep(0.01)
                    if received >= size:
                        break
        assert (received >= size) == (pause == 0)

    served(app, client)


def test_what_does_not_reach_the_application_is_an_error_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not HTTP, a head that is too long, and a connection too many; those before it are served."""
    monkeypatch.setattr(module, "CONNECTIONS", 1)

    async def client(address: Any) -> None:
        kept, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST)
        assert (await kept.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        for data, status in ((b"nonsense\r\n\r\n", 400), (REQUEST[:16] + b"a" * 100_000, 400), (REQUEST, 503)):
            reader, other = await asyncio.open_connection(*address)
            other.write(data)
            head, _, body = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d" % status)
            assert head.count(b"content-security-policy: default-src 'none'") == 1
            assert list(json.loads(body)) == ["error"]
            other.close()
        writer.write(REQUEST)
        assert (await kept.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.close()

    served(answer_ok, client)


def test_a_wish_for_another_protocol_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """The server answers in HTTP, and advises nobody to install packages."""

    async def client(address: Any) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(REQUEST[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.close()

    served(answer_ok, client)
    assert not caplog.messages


def test_the_body_of_an_answer_does_not_wait_for_the_receipt_of_its_head() -> None:
    """Nagle's algorithm is off in each connection; asyncio leaves it on where a socket does not name its protocol."""
    seen: list[int] = []

    class Watched(Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            accepted = transport.get_extra_info("socket")
            seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    async def work() -> None:
        config = uvicorn.Config(module.refuse, http=Watched, lifespan="off", log_config=None)
        config.load()
        state = uvicorn.Server(config).server_state
        with listen("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(
                lambda: Watched(config=config, server_state=state, app_state={}), sock=listener
            )
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writer.write(REQUEST)
            await reader.read(1)
            writer.close()
            server.close()

    asyncio.run(work())
    assert len(seen) == 1 and seen[0]
