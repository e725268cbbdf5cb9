"""Server-sent events, and what happens when the client leaves. Per event: one encode, one send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import Response

from foretell.server.errors import ClientGoneError, as_api_error, error_body, told
from foretell.server.guard import send_error

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")
log = logging.getLogger("foretell.server")
_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
GRACE_SECONDS = 60.0  # that a stream may take beyond its request's deadline, for a client that reads slowly
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(content: Any, name: str | None = None) -> bytes:
    """One event; ``name`` for protocols whose events have one."""
    head = b"data: " if name is None else b"event: " + name.encode() + b"\ndata: "
    return head + _encode(content) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T], limit_seconds: float | None = None) -> T:
    """Do ``work``, and cancel it when the client leaves (ClientGoneError) or does not take it in time."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watch}, timeout=limit_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends ``pieces``. What fails before the first piece is an ordinary error answer; later it is an error event,
    and then [DONE] does not come. When the client leaves, ``pieces`` is closed at once."""

    def __init__(
        self, pieces: AsyncIterator[bytes], timeout_seconds: float | None, *, named_errors: bool = False
    ) -> None:
        super().__init__()
        self.pieces = pieces
        self.limit_seconds = None if timeout_seconds is None else timeout_seconds + GRACE_SECONDS
        self.named_errors = named_errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._pump(scope, send), self.limit_seconds)
        except ClientGoneError:
            return

    async def _pump(self, scope: Scope, send: Send) -> None:
        started = False
        try:
            async for piece in self.pieces:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            if as_api_error(error) is None:
                log.exception("request %s to %s failed", scope.get("request_id"), scope["path"])
            if not started:
                await send_error(told(error), scope, send)
                return
            body = error_body(told(error), scope["path"], scope.get("request_id"))
            piece = event(body, "error" if self.named_errors else None)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        finally:
            await self.pieces.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": b"", "more_body": False})
