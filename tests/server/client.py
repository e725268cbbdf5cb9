"""HTTP without a socket: httpx straight into the application."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

from foretell.server.app import create_app
from foretell.server.config import ServerConfig
from foretell.server.text_engine import TextEngine

T = TypeVar("T")
URL = "http://127.0.0.1"


def client_for(engine: TextEngine, config: ServerConfig | None = None, **options: Any) -> httpx.AsyncClient:
    app = create_app(engine, config)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=options.pop("raise_app_exceptions", True))
    return httpx.AsyncClient(transport=transport, base_url=URL, timeout=60, **options)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def request(
    engine: TextEngine, method: str, path: str, config: ServerConfig | None = None, **options: Any
) -> httpx.Response:
    """One request to an application of its own."""

    async def go() -> httpx.Response:
        async with client_for(engine, config) as client:
            return await client.request(method, path, **options)

    return run(go())
