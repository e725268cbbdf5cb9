"""The outermost layer, plain ASGI: request ids, authorisation, and an answer to whatever nobody caught."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from foretell.server.auth import authorize
from foretell.server.errors import ApiError, error_body, told

if TYPE_CHECKING:
    from foretell.server.config import ServerConfig

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("foretell.server")
DRAIN_SECONDS = 1.0
DRAIN_BYTES = 64 << 20  # of a body whose length was stated, however small the limit of bodies is
_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Guard:
    """Wraps the whole application. ``scope["request_id"]`` is ours; a client's own is only ever echoed."""

    def __init__(
        self, app: App, config: ServerConfig, on_answer: Callable[[int], None] = lambda status: None
    ) -> None:
        self.app = app
        self.config = config
        self.on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = header_dict(scope)
        request_id = scope["request_id"] = f"req-{secrets.token_hex(12)}"
        # OpenAI's clients read the one, Anthropic's the other
        extra = [(b"x-request-id", request_id.encode()), (b"request-id", request_id.encode())]
        client_id = headers.get("x-client-request-id") or headers.get("x-request-id") or ""
        if _CLIENT_ID.fullmatch(client_id):
            extra.append((b"x-client-request-id", client_id.encode()))
        body = _Body(receive, headers)
        started = False

        async def send_with_id(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if not started and message["type"] == "http.response.start":
                started = True
                self.on_answer(message["status"])
                if message["status"] >= 400 and body.is_expected:
                    await body.drain(self.config.max_body_bytes)
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            authorize(scope["path"], headers, self.config)
            await self.app(scope, body.receive, send_with_id)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request %s to %s failed", request_id, scope["path"])
            if started:
                raise  # the server closes the connection: the client must see that the answer is not whole
            await send_error(told(error), scope, send_with_id)


class _Body:
    """What a request still has to say. A connection that is closed with bytes unread is reset, and then the client
    may never see why it was refused."""

    def __init__(self, receive: Receive, headers: dict[str, str]) -> None:
        self._receive = receive
        length = headers.get("content-length", "0")
        self.is_expected = length != "0" or "transfer-encoding" in headers
        self._stated_bytes = int(length) if length.isdecimal() and len(length) < 18 else 0

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self.is_expected = False
        return message

    async def drain(self, max_bytes: int) -> None:
        """Read the rest, within limits: a stated length is an end in sight, other bodies may have none."""
        max_bytes = max(max_bytes, min(self._stated_bytes, DRAIN_BYTES))
        read = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.is_expected and read <= max_bytes:
                    read += len((await self.receive()).get("body", b""))


def header_dict(scope: Scope) -> dict[str, str]:
    """Names in lower case; of a header that is sent twice, the last."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    body = msgspec.json.encode(error_body(error, scope["path"], scope.get("request_id")))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
