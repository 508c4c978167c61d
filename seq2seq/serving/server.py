"""uvicorn around the application: its socket, its signals, and clients that do not finish their requests."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from seq2seq.serving.answers import Refused, error_answer
from seq2seq.serving.middleware import CLOSE, SECURITY_HEADERS
from seq2seq.serving.service import Service
from seq2seq.utils.errors import UserError

HEADER_SECONDS = 10  # that the head of a request may take
KEEP_ALIVE_SECONDS = 15  # that a connection may idle between two requests
ANSWER_SECONDS = 5  # for clients to read their last answers, after the service has closed
READ_SECONDS = 30  # that a client may pause while it reads an answer
CONNECTIONS = 1000  # at a time; requests of further ones are answered with 503


class Server(uvicorn.Server):
    """Ends at a signal, after the service has answered what it accepted; at a second signal at once."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        options: dict[str, Any] = {
            "http": Protocol,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,  # it would log addresses with the texts in their queries
            "server_header": False,
            "proxy_headers": False,
            "timeout_keep_alive": KEEP_ALIVE_SECONDS,
            "timeout_graceful_shutdown": ANSWER_SECONDS,
        }
        super().__init__(uvicorn.Config(app, **options))
        self.service = service
        self.draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        asyncio.get_running_loop().call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """Stop gently, then at once."""
        if self.draining is None:
            self.draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # answers that are cut off are no errors
            self.draining.cancel()
            self.service.kill()
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        await self.service.close()
        self.should_exit = True


class Protocol(H11Protocol):
    """HTTP/1.1, where a client has little time to send the head of a request, and to read its answer.

    What uvicorn answers by itself has the form of the application's errors.
    """

    head_timer: asyncio.TimerHandle | None = None
    read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does this only for sockets that name their protocol; a body would wait 40 ms for the head's receipt.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._time_head()
        if len(self.connections) > CONNECTIONS:
            self.app = refuse

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._stop_read_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_read_timer()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer is on its way
            self.transport.abort()
            return
        answer = plain_error(400, "request: it is not HTTP/1.1, or its head is too long")
        response = h11.Response(status_code=400, headers=answer.raw_headers, reason="Bad Request")
        for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # without advice on packages that would not help

    def _time_head(self) -> None:
        """Begin to wait for a head, or end it: once it is here, there is a cycle of request and response."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self.head_timer is None:
            self.head_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self.head_timer:
            self.head_timer.cancel()
            self.head_timer = None

    def _time_reader(self, before: float = math.inf) -> None:
        """End a connection whose client has read nothing since the last look: its answer fills memory."""
        unread = self.transport.get_write_buffer_size()
        if unread >= before:
            self.transport.abort()
        else:
            self.read_timer = self.loop.call_later(READ_SECONDS, self._time_reader, unread)

    def _stop_read_timer(self) -> None:
        if self.read_timer:
            self.read_timer.cancel()
            self.read_timer = None


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request of a connection beyond their number."""
    await plain_error(503, f"the server has {CONNECTIONS:,} connections, its most; try again soon")(
        scope, receive, send
    )


def plain_error(status: int, message: str) -> Response:
    """Return the response to a request that does not reach the application; it ends the connection."""
    answer = error_answer(Refused(status, message, {**CLOSE, "retry-after": "1"} if status == 503 else CLOSE))
    answer.raw_headers += SECURITY_HEADERS
    return answer


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except socket.gaierror as error:
        raise UserError(f"host: {host} is not an address of this machine ({error.strerror})") from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"port: cannot listen on {host}:{port} ({reason}); set another port=… or host=…") from None
