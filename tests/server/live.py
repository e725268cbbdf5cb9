"""A real server on loopback, in a thread: for clients that want a socket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from foretell.server.app import create_app
from foretell.server.config import ServerConfig
from foretell.server.text_engine import TextEngine


@contextmanager
def serving(engine: TextEngine, config: ServerConfig | None = None) -> Iterator[str]:
    """The base URL of uvicorn on a free port."""
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(create_app(engine, config), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not started.wait(30):
            raise RuntimeError("uvicorn did not start")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
