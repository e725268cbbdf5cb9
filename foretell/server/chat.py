"""Chat: messages → prompt ids, and what the engine says → text and tool calls. All chat routes stand on this."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import InvalidRequestError
from foretell.server.tools import (
    ConstrainedParser,
    ToolParser,
    detect_tool_format,
    marker_tokens,
    template_knows_tools,
    told_in_words,
    tool_choice_schema,
    tool_parser_for,
)
from foretell.server.tools import ToolCallDelta as ToolCallDelta

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.server.text_engine import TextEngine
    from foretell.service import Update

Message = dict[str, Any]
ToolChoice = str | dict[str, Any]  # "none", "auto", "required" or {"name": …}

_THREAD_CHARS: Final = 20_000  # rendering and tokenising more than this would hold up the event loop
_KWARG_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_RESERVED_KWARGS: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "self", "loop", "caller", "varargs"}
)
_MAX_KWARG_CHARS: Final = 4096


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One conversation and how to answer it. ``messages`` have a role and, as a rule, a content that is text;
    ``tools`` are OpenAI's function objects; ``continue_final_message`` goes on with the last message's own words."""

    messages: list[Message]
    params: SamplingParams
    tools: Sequence[dict[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True  # False: calls after the first are dropped
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    priority: int = 0
    timeout_seconds: float | None = None
    max_prompt_chars: int = 1_000_000

    @property
    def uses_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """What output ``index`` grew by. ``finish_reason``: stop, length, tool_calls, abort or error. ``update`` has the
    tokens, their logprobs, and the figures of the whole request."""

    index: int
    text: str
    tool_calls: tuple[ToolCallDelta, ...]
    finish_reason: str | None
    update: Update


def prompt_ids(engine: TextEngine, request: ChatRequest) -> list[int]:
    """The conversation as token ids, through the model's chat template; InvalidRequestError if it has none,
    if it refuses the messages, or if the result is longer than allowed."""
    if engine.tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer: chat needs text, use /v1/completions with token ids")
    check_template_kwargs(request.template_kwargs)
    continues = request.continue_final_message
    if continues and request.add_generation_prompt:
        raise InvalidRequestError("continue_final_message needs add_generation_prompt=false: one turn or the other")
    messages, tools = request.messages, list(request.tools) if request.tool_choice != "none" else []
    if not template_knows_tools(_template_source(engine)):
        messages, tools = told_in_words(messages, tools, required=request.tool_choice != "auto"), []
    text = engine.tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=request.add_generation_prompt,
        tools=tools or None,
        **request.template_kwargs,
    )
    if continues:
        text = _cut_after_final_message(text, messages)
    check_prompt_chars(len(text), request.max_prompt_chars)
    return engine.preparer.token_ids(text, add_special_tokens=False)


async def prompt_ids_aside(engine: TextEngine, request: ChatRequest) -> list[int]:
    """The same; what may take long is worked on in a thread, so that others are not held up."""
    chars = sum(map(_chars, request.messages))
    if chars > _THREAD_CHARS or request.tools or request.template_kwargs:
        return await asyncio.to_thread(prompt_ids, engine, request)
    return prompt_ids(engine, request)


async def chat_deltas(
    engine: TextEngine, request: ChatRequest, ids: list[int] | None = None
) -> AsyncIterator[ChatDelta]:
    """Answer a conversation. ``ids`` saves rendering it again when the caller has done it. Errors are those of
    ``prompt_ids`` and ``TextEngine.stream``; leaving the iterator aborts the request."""
    ids = await prompt_ids_aside(engine, request) if ids is None else ids
    params = answer_params(engine, request)
    parsers: dict[int, ToolParser] = {}
    called: set[int] = set()
    stream = engine.stream(ids, params, priority=request.priority, timeout_seconds=request.timeout_seconds)
    async with aclosing(stream) as updates:  # type: ignore[type-var]
        async for update in updates:
            index, reason = update.index, update.finish_reason
            if not request.uses_tools:
                yield ChatDelta(index, update.delta_text, (), reason, update)
                continue
            if index not in parsers:
                parsers[index] = new_parser(engine, request)
            parts = parsers[index].parts(update.delta_text)
            if reason is not None:
                parts.append(parsers[index].finish())
            if not request.parallel_tool_calls:
                parts = [(text, [call for call in calls if call.index == 0]) for text, calls in parts]
            if any(calls for _, calls in parts):
                called.add(index)
            if reason == "stop" and index in called:
                reason = "tool_calls"
            for delta in _in_order(parts, reason, update):
                yield delta


def _in_order(
    parts: Sequence[tuple[str, list[ToolCallDelta]]], reason: str | None, update: Update
) -> Iterator[ChatDelta]:
    """Text and calls as the model wrote them, however many came at once. The tokens are told with the last."""
    *before, (text, calls) = parts or [("", [])]
    for earlier, its_calls in before:
        quiet = replace(update, delta_text="", delta_token_ids=(), finish_reason=None)
        yield ChatDelta(update.index, earlier, tuple(its_calls), None, quiet)
    yield ChatDelta(update.index, text, tuple(calls), reason, update)


def answer_params(engine: TextEngine, request: ChatRequest) -> SamplingParams:
    """The request's parameters: constrained to a tool call where one is required, else with the marker of a call
    left in the text where it is a special token."""
    if not request.uses_tools:
        return request.params
    if request.tool_choice != "auto":
        if request.params.structured is not None:
            raise InvalidRequestError("a required tool call has a form of its own: leave out the form of the answer")
        form = tool_choice_schema(request.tools, request.tool_choice, parallel=request.parallel_tool_calls)
        return replace(request.params, structured=form)
    special = engine.tokenizer.special_texts if engine.tokenizer is not None else frozenset()
    if request.params.structured is None and special.intersection(marker_tokens(tool_format(engine))):
        return replace(request.params, skip_special_tokens=False)
    return request.params


def new_parser(engine: TextEngine, request: ChatRequest) -> ToolParser:
    """For one answer; calls of tools that the request does not have come out as text."""
    if request.tool_choice != "auto":
        return ConstrainedParser()
    return tool_parser_for(tool_format(engine), [tool["function"]["name"] for tool in request.tools])


def tool_format(engine: TextEngine) -> str:
    """How the model writes tool calls, by its chat template and its special tokens; or as it was told in words."""
    if not template_knows_tools(_template_source(engine)):
        return "hermes"
    special = engine.tokenizer.special_texts if engine.tokenizer is not None else frozenset()
    return detect_tool_format(_template_source(engine), special)


def check_prompt_chars(chars: int, limit: int) -> None:
    if chars > limit:
        raise InvalidRequestError(f"the prompt has {chars} characters and {limit} are allowed: shorten it")


def check_template_kwargs(kwargs: Mapping[str, Any]) -> None:
    """chat_template_kwargs switch things in the model's template (enable_thinking=false): plain values only."""
    for name, value in kwargs.items():
        if not _KWARG_NAME.fullmatch(name) or name in _RESERVED_KWARGS or name.endswith("_token"):
            raise InvalidRequestError(f"chat_template_kwargs: {name[:64]!r} is no name that a request may set")
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise InvalidRequestError(f"chat_template_kwargs: {name} must be text, a number, true, false or null")
        if isinstance(value, str) and len(value) > _MAX_KWARG_CHARS:
            raise InvalidRequestError(f"chat_template_kwargs: {name} is longer than {_MAX_KWARG_CHARS} characters")


def _cut_after_final_message(text: str, messages: Sequence[Message]) -> str:
    """The rendering up to the end of the last message's words, without what closes its turn."""
    content = messages[-1].get("content")
    words = content.strip() if isinstance(content, str) else ""
    at = text.rfind(words) if words else -1
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the last message needs a content that the chat template writes as it is"
        )
    return text[: at + len(words)]


def _template_source(engine: TextEngine) -> str:
    templates = engine.tokenizer._templates if engine.tokenizer is not None else {}
    chosen = templates.get("tool_use") or templates.get("default")
    return "" if chosen is None else chosen.source


def _chars(message: Message) -> int:
    """About as many characters as it takes; calls of tools, whose arguments have any size, count as many."""
    texts = sum(len(value) for value in message.values() if isinstance(value, str))
    return 256 + texts + (_THREAD_CHARS if message.get("tool_calls") else 0)
