"""From a chat request to an answer, for the interfaces that are not chat's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foretell.core.params import SamplingParams
from foretell.core.structured import StructuredOutput
from foretell.server.answers import raise_if_failed
from foretell.server.chat import ChatDelta, ChatRequest, chat_deltas, check_template_kwargs, prompt_ids_aside
from foretell.server.conversation import since, turn_starts
from foretell.server.sampling import check_count, refused
from foretell.server.structured import check_schema_size, check_tools_size

if TYPE_CHECKING:
    from foretell.server.chat import ToolChoice
    from foretell.server.config import ServerConfig
    from foretell.server.context import Server
    from foretell.server.conversation import Message
    from foretell.server.protocol.extras import Extras
    from foretell.server.text_engine import TextEngine


_EXTRAS = ("top_k", "min_p", "repetition_penalty", "seed", "ignore_eos")


async def sound_deltas(engine: TextEngine, chat: ChatRequest, ids: list[int]) -> AsyncIterator[ChatDelta]:
    """The answer's deltas; an answer that the engine could not finish is raised as the error it is."""
    async with aclosing(chat_deltas(engine, chat, ids)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            raise_if_failed(delta.update)
            yield delta


async def fitting(engine: TextEngine, chat: ChatRequest) -> tuple[ChatRequest, list[int]]:
    """The request and its prompt, with as many of its newest turns as leave room for an answer (truncation "auto").
    If not even the last one fits, the request as it is: the engine says why it cannot run."""
    longest = engine.about.max_model_len - 1
    ids = await prompt_ids_aside(engine, chat)
    if len(ids) <= longest:
        return chat, ids
    best = chat, ids
    starts = turn_starts(chat.messages)
    low, high = 0, len(starts)  # the first start that fits lies between them
    while low < high:
        middle = (low + high) // 2
        shorter = replace(chat, messages=since(chat.messages, starts[middle]))
        shorter_ids = await prompt_ids_aside(engine, shorter)
        if len(shorter_ids) <= longest:
            best, high = (shorter, shorter_ids), middle
        else:
            low = middle + 1
    return best


def chat_request(
    asked: Extras,
    server: Server,
    messages: list[Message],
    tools: list[dict[str, Any]],
    choice: ToolChoice,
    **params: Any,
) -> ChatRequest:
    """What to ask of the engine; ApiError for what is beyond the limits. ``params``: what the interface itself says
    about sampling, in SamplingParams' words."""
    config, kwargs = server.config, asked.chat_template_kwargs or {}
    check_count("messages", len(messages), config.max_messages, "entries")
    check_count("chat_template_kwargs", len(kwargs), config.max_template_kwargs, "entries")
    check_template_kwargs(kwargs)
    check_tools(tools, choice, config)
    given = {name: getattr(asked, name) for name in _EXTRAS if getattr(asked, name) is not None}
    return ChatRequest(
        messages,
        SamplingParams(**given, **params),
        tools=tools,
        tool_choice=choice,
        template_kwargs=kwargs,
        priority=asked.priority or 0,
        timeout_seconds=server.timeout(asked.timeout_seconds),
        max_prompt_chars=config.max_prompt_chars,
    )


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """A tool as chat knows it."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def check_tools(tools: Sequence[dict[str, Any]], choice: ToolChoice, config: ServerConfig) -> None:
    """ApiError for too many, too large, two of one name, or a choice of what is not there."""
    check_count("tools", len(tools), config.max_tools, "entries")
    check_tools_size(list(tools), config)
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        raise refused("tools", "two tools have the same name")
    if choice == "required" and not tools:
        raise refused("tool_choice", "tool_choice asks for a tool, and there are no tools")
    if isinstance(choice, dict) and choice["name"] not in names:
        raise refused("tool_choice", f"tool_choice names {choice['name'][:64]!r}, which is not among the tools")


def json_form(param: str, schema: dict[str, Any] | None, config: ServerConfig) -> StructuredOutput:
    """An answer that must be JSON: of this schema, or any object."""
    if schema is None:
        return StructuredOutput.json_object()
    return StructuredOutput.json_schema(check_schema_size(param, schema, config))
