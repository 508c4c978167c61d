"""seq2seq serve: a translation server with a web page and a LibreTranslate-compatible API."""

from __future__ import annotations

import asyncio

from seq2seq.config.schema import ServeConfig
from seq2seq.serving.service import Service
from seq2seq.utils.errors import UserError


def serve(config: ServeConfig) -> None:
    """Serve until a signal to stop."""
    try:
        import uvicorn

        from seq2seq.serving.app import create_app
    except ImportError:
        raise UserError("serve needs FastAPI and uvicorn: pip install 'seq2seq[serve]'") from None

    async def run() -> None:
        service = await Service.start(config)
        app = create_app(service, config)
        await uvicorn.Server(uvicorn.Config(app, config.host, config.port)).serve()

    asyncio.run(run())
