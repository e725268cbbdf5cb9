"""A lean HTTP/1.1 client: llhttp parses, asyncio carries, connections are kept. Many times cheaper per chunk than
a general client, which matters where the client shares a machine with what it measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools

from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.loadgen.target import Target

OnBody = Callable[["Answer", bytes, float], None]  # bytes of its body, and when they arrived (time.monotonic)
CONNECT_SECONDS = 30.0


class HttpError(ForetellError):
    """``kind`` is a short name to count by: connect, disconnected, bad response."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Answer:
    """One response: its head, and where its body goes."""

    def __init__(self, on_body: OnBody, done: asyncio.Future[None]) -> None:
        self.on_body = on_body
        self.done = done
        self.begun = False
        self.status = 0
        self.headers: dict[str, str] = {}

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Connection(asyncio.Protocol):
    """Carries one request at a time. llhttp calls the on_… methods; a ValueError of ``on_body`` ends the answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: Answer | None = None
        self.usable = True
        self.now = 0.0
        self.parser = httptools.HttpResponseParser(self)

    def send(self, message: bytes, answer: Answer) -> None:
        assert self.transport is not None, "connected before it is used"
        self.answer = answer
        self.transport.write(message)

    def close(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    # -- asyncio ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's

    def data_received(self, data: bytes) -> None:
        self.now = time.monotonic()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._lost(HttpError("bad response", f"not the stream it should be: {error.__context__ or error}"))
        except httptools.HttpParserError as error:
            self._lost(HttpError("bad response", f"not an HTTP answer: {error}"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        answer = self.answer
        if answer is not None and answer.begun and not self._framed(answer):
            self.on_message_complete()  # a body without length or chunks ends with the connection
            return
        why = f": {exc}" if exc else ""
        self._lost(HttpError("disconnected", f"the server closed the connection{why}"))

    @staticmethod
    def _framed(answer: Answer) -> bool:
        return "content-length" in answer.headers or "transfer-encoding" in answer.headers

    def _lost(self, error: Exception) -> None:
        answer, self.answer = self.answer, None
        if answer is not None:
            answer.fail(error)
        self.close()

    # -- llhttp -----------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.answer is None:
            raise ValueError("an answer to nothing")
        self.answer.begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.answer is not None:
            self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self.answer is not None:
            self.answer.status = self.parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if self.answer is not None:
            self.answer.on_body(self.answer, data, self.now)

    def on_message_complete(self) -> None:
        answer = self.answer
        if answer is None or 100 <= answer.status < 200:
            return
        self.answer = None
        self.usable = self.usable and bool(self.parser.should_keep_alive())
        if not answer.done.done():
            answer.done.set_result(None)


class HttpClient:
    """Connections to one target, kept open between requests and opened as needed."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.idle: list[Connection] = []
        self.opened = 0
        self._ssl = target.ssl_context()

    async def request(self, message: bytes, on_body: OnBody, *, deadline: float | None = None) -> Answer:
        """Send and wait for the end of the answer. ``deadline`` is on the event loop's clock: TimeoutError.

        Raises HttpError. A kept connection that the server had closed before it answered anything is replaced
        once: that is a race every client meets and no failure of the server.
        """
        async with asyncio.timeout_at(deadline):
            connection = self._kept()
            if connection is not None:
                answer = Answer(on_body, asyncio.get_running_loop().create_future())
                try:
                    return await self._exchange(connection, message, answer)
                except HttpError as error:
                    if error.kind != "disconnected" or answer.begun:
                        raise
            answer = Answer(on_body, asyncio.get_running_loop().create_future())
            return await self._exchange(await self._connect(), message, answer)

    async def _exchange(self, connection: Connection, message: bytes, answer: Answer) -> Answer:
        try:
            connection.send(message, answer)
            await answer.done
        except BaseException:
            connection.close()  # also on cancellation: the server sees that nobody listens any more
            raise
        if connection.usable:
            self.idle.append(connection)
        else:
            connection.close()
        return answer

    def _kept(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop, target = asyncio.get_running_loop(), self.target
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(Connection, target.host, target.port, ssl=self._ssl)
        except TimeoutError:
            raise HttpError("connect", f"no connection to {target.url} within {CONNECT_SECONDS:g} s") from None
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that no resolver takes
            raise HttpError("connect", f"no connection to {target.url}: {_why(error)}") from None
        self.opened += 1
        return connection

    def close(self) -> None:
        for connection in self.idle:
            connection.close()
        self.idle.clear()


async def fetch(client: HttpClient, message: bytes, *, seconds: float) -> tuple[int, bytes]:
    """Status and whole body of a short answer."""
    parts: list[bytes] = []
    deadline = asyncio.get_running_loop().time() + seconds
    answer = await client.request(message, lambda _, data, now: parts.append(data), deadline=deadline)
    return answer.status, b"".join(parts)


def _why(error: Exception) -> Any:
    return getattr(error, "strerror", None) or error
