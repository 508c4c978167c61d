"""seq2seq serve: a translation server with a web page and a LibreTranslate-compatible API."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from dataclasses import replace

from seq2seq.config.schema import ServeConfig
from seq2seq.serving.service import ModelInfo, Service
from seq2seq.utils.errors import STOPPED, UserError


def serve(config: ServeConfig) -> None:
    """Serve until a signal to stop."""
    try:
        from seq2seq.serving.server import listen
    except ImportError:
        raise UserError("serve needs FastAPI and uvicorn: pip install 'seq2seq[serve]'") from None
    config = replace(config, api_key=config.api_key or os.environ.get("SEQ2SEQ_API_KEY") or None)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("seq2seq").setLevel(logging.INFO)
    with listen(config.host, config.port) as listener:
        asyncio.run(run(config, listener))


async def run(config: ServeConfig, listener: socket.socket) -> None:
    from seq2seq.serving.app import create_app
    from seq2seq.serving.server import Server

    service = await Service.start(config)
    try:
        server = Server(create_app(service, config), service)
        print_facts(config, service, listener)
        await server.serve([listener])
    finally:
        service.kill()
    if server.force_exit:
        raise SystemExit(STOPPED)


def print_facts(config: ServeConfig, service: Service, listener: socket.socket) -> None:
    """Print the address and what it serves; warn if everybody may use it."""
    from seq2seq.serving.middleware import is_loopback

    models = list(service.models.values())
    workers = f"{len(service.pool.workers)} worker{'s' if len(service.pool.workers) > 1 else ''}"
    print(f"serving    {url(config.host, listener)}  ({workers}; {models[0].engine}; beam {config.search.beam})")
    for model in models:
        print(f"model      {described(model)}")
    print("stop       Ctrl-C", flush=True)
    if not is_loopback(config.host) and config.api_key is None:
        advice = "set api_key=… or the variable SEQ2SEQ_API_KEY, or host=127.0.0.1"
        print(f"warning: everybody who reaches {config.host} may use this server; {advice}", file=sys.stderr)


def described(model: ModelInfo) -> str:
    update = "" if model.update is None else f", update {model.update:,}"
    return f"{model.name}: {model.source} → {model.target}, {model.family}, {model.parameters:,} parameters{update}"


def url(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
