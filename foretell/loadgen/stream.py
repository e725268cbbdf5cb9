"""What a server streams: server-sent events, and in them the pieces of OpenAI's completions and chats."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

MAX_EVENT_BYTES = 16 << 20


class EventLines:
    """Bytes as they come → the data of each event (WHATWG HTML, 9.2.6; lines end with LF or CR LF)."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def push(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes. ValueError when one grows without end."""
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        events = []
        for raw in lines:
            line = raw[:-1] if raw.endswith(b"\r") else raw
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif not line and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events


class Delta(msgspec.Struct):
    """Each is text, or with some servers a list of parts: all that counts here is whether something is there."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None


class Choice(msgspec.Struct):
    text: Any = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        if self.text:
            return True
        delta = self.delta
        return delta is not None and bool(
            delta.content or delta.reasoning_content or delta.reasoning or delta.refusal or delta.tool_calls
        )


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Piece(msgspec.Struct):
    """One event of a completion or a chat; fields that do not matter here are skipped unread."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(Piece).decode


class StreamReader:
    """Follows one streamed answer. ``token_times`` has the moment of each piece with text in it; a role alone,
    an empty text or a usage report is no token. ``error`` is the server's own, sent as an event."""

    def __init__(self) -> None:
        self.lines = EventLines()
        self.token_times = array("d")
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.done = False  # "[DONE]" was seen
        self.error: str | None = None

    def push(self, data: bytes, now: float) -> None:
        """ValueError for what is no such stream."""
        for event in self.lines.push(data):
            if event == b"[DONE]":
                self.done = True
                continue
            piece = _decode(event)
            for choice in piece.choices:
                if choice.has_text:
                    self.token_times.append(now)
                if choice.finish_reason is not None:
                    self.finish_reason = choice.finish_reason
                    if not self.token_times:
                        self.token_times.append(now)  # an answer without any visible text was an answer still
            if piece.usage is not None:
                self.usage = piece.usage
            if piece.error is not None:
                self.error = error_text(piece.error)


def error_text(error: Any) -> str:
    """One line of an error object in OpenAI's shape, or of whatever came in its place."""
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def error_of_body(body: bytes) -> str:
    """The message in the body of a refusal, as far as it can be read."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return " ".join(body[:300].decode("utf-8", "replace").split())
    if isinstance(value, dict):
        return error_text(value.get("error") or value.get("detail") or value)
    return error_text(value)
