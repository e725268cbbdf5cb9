"""POST /v1/chat/completions: what we answer, whole or in chunks."""

from __future__ import annotations

from typing import Literal

from foretell.server.protocol.base import Response
from foretell.server.protocol.logprobs import ChoiceLogprobs, PromptLogprobs
from foretell.server.protocol.usage import Usage

FinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCall(Response):
    name: str
    arguments: str


class ToolCall(Response):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(Response):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Response):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(Response):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class FunctionCallDelta(Response):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(Response):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class AnswerDelta(Response):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Response):
    index: int
    delta: AnswerDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Response):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None
