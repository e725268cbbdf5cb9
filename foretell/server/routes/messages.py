"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's interface."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request, Response

from foretell.server.answering import sound_deltas
from foretell.server.chat import ChatRequest, answer_params, prompt_ids_aside
from foretell.server.context import Server, server_of
from foretell.server.errors import NO_THREADS, ApiError
from foretell.server.limits import parse
from foretell.server.messages_events import Event, MessageEvents
from foretell.server.messages_request import allows_one_call, begin_message, chat_request, stop_of, usage_of
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.anthropic import CountTokensRequest, MessagesRequest
from foretell.server.protocol.anthropic_answers import MessageObject, MessagesError, TokenCount
from foretell.server.responses import json_response
from foretell.server.sse import EventStream, event, unless_gone

router = APIRouter()
_TAGS = ("messages",)
OLDEST_VERSION = "2023-06-01"  # before it, answers and streams had another form; since then they have only grown


@router.post(
    "/v1/messages",
    **describe(
        MessageObject,
        body=MessagesRequest,
        summary="Answer in Anthropic's way",
        stream=True,
        errors=ENGINE_ERRORS,
        error_model=MessagesError,
        tags=_TAGS,
    ),
)
async def create_message(request: Request) -> Response:
    server = server_of(request)
    _check_version(request)
    asked = await parse(request, MessagesRequest, server.config)
    model = server.check_model(asked.model)
    if asked.thread is not None:
        raise ApiError(400, "no threads are kept here: send the whole conversation", param="thread", code=NO_THREADS)
    chat = chat_request(asked, server)
    ids = await prompt_ids_aside(server.engine, chat)
    server.engine.check(ids, answer_params(server.engine, chat))
    machine = MessageEvents(begin_message(model), max_calls=1 if allows_one_call(asked) else None)
    events = _events(server, machine, asked, chat, ids)
    if asked.stream:
        return EventStream(_pieces(events), chat.timeout_seconds, named_errors=True)
    await unless_gone(request.receive, _exhaust(events))
    return json_response(machine.message)


@router.post(
    "/v1/messages/count_tokens",
    **describe(
        TokenCount,
        body=CountTokensRequest,
        summary="How many tokens a prompt has",
        error_model=MessagesError,
        tags=_TAGS,
    ),
)
async def count_tokens(request: Request) -> Response:
    server = server_of(request)
    _check_version(request)
    asked = await parse(request, CountTokensRequest, server.config)
    server.check_model(asked.model)
    ids = await prompt_ids_aside(server.engine, chat_request(asked, server))
    return json_response(TokenCount(input_tokens=len(ids)))


def _check_version(request: Request) -> None:
    """anthropic-version may be missing; what is older than this interface is refused."""
    version = request.headers.get("anthropic-version", OLDEST_VERSION)
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", version) or version < OLDEST_VERSION:
        raise ApiError(400, f"anthropic-version {version[:40]!r} is not spoken here: send {OLDEST_VERSION} or later")


async def _events(
    server: Server, machine: MessageEvents, asked: MessagesRequest, chat: ChatRequest, ids: list[int]
) -> AsyncIterator[Event]:
    """What goes wrong is raised; the answer has no status yet before the first event."""
    async with aclosing(sound_deltas(server.engine, chat, ids)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            if not machine.has_started:
                for one in machine.start(usage_of(delta.update)):
                    yield one
            for one in machine.push(delta.text, delta.tool_calls):
                yield one
            reason = "tool_calls" if machine.stream.is_full else delta.finish_reason
            if reason is not None:
                for one in machine.finish(*stop_of(reason, delta.update, asked), usage_of(delta.update)):
                    yield one
                return


async def _pieces(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    async with aclosing(events) as each:  # type: ignore[type-var]
        async for one in each:
            yield event(one, one["type"])


async def _exhaust(events: AsyncIterator[Event]) -> None:
    async with aclosing(events) as each:  # type: ignore[type-var]
        async for _ in each:
            pass
