"""POST /v1/messages and /v1/messages/count_tokens: what they give."""

from __future__ import annotations

from typing import Any, Literal

from foretell.server.protocol.base import Response


class AnswerText(Response):
    type: Literal["text"]
    text: str


class AnswerToolUse(Response):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessagesUsage(Response):
    """The whole prompt is input_tokens and cache_read_input_tokens together."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(Response):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerToolUse]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Response):
    input_tokens: int


class MessagesErrorDetails(Response):
    error_code: str


class MessagesErrorObject(Response):
    type: str
    message: str
    details: MessagesErrorDetails | None = None


class MessagesError(Response):
    type: Literal["error"]
    error: MessagesErrorObject
    request_id: str | None
