"""POST /v1/responses: OpenAI's second interface. GET and DELETE look after the answers that are kept."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from foretell.server.answering import fitting, sound_deltas
from foretell.server.auth import presented_keys
from foretell.server.chat import ChatRequest, answer_params, prompt_ids_aside
from foretell.server.context import Server, server_of
from foretell.server.errors import ApiError, as_api_error, told
from foretell.server.limits import parse
from foretell.server.logprobs import TokenNames, chat_logprobs
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.responses import InputTokensRequest, ResponsesRequest
from foretell.server.protocol.responses_answers import DeletedResponse, InputTokens, ResponseObject
from foretell.server.response_store import ResponseStore, Stored, owner_of
from foretell.server.responses import json_response
from foretell.server.responses_events import Event, ResponseEvents
from foretell.server.responses_request import answer_messages, begin_response, chat_request, usage_of
from foretell.server.sse import EventStream, event, unless_gone

if TYPE_CHECKING:
    from foretell.server.chat import ChatDelta

log = logging.getLogger("foretell.server")
router = APIRouter()
_TAGS = ("responses",)


@router.post(
    "/v1/responses",
    **describe(
        ResponseObject,
        body=ResponsesRequest,
        summary="Answer, with items in and items out",
        stream=True,
        errors=ENGINE_ERRORS,
        tags=_TAGS,
    ),
)
async def create_response(request: Request) -> Response:
    server = server_of(request)
    asked = await parse(request, ResponsesRequest, server.config)
    answer = await Answer.begin(request, server, asked)
    if asked.stream:
        return EventStream(answer.pieces(), answer.chat.timeout_seconds)
    return json_response(await unless_gone(request.receive, answer.whole()))


@router.post(
    "/v1/responses/input_tokens",
    **describe(InputTokens, body=InputTokensRequest, summary="How many tokens an input has", tags=_TAGS),
)
async def count_input_tokens(request: Request) -> Response:
    server = server_of(request)
    asked = await parse(request, InputTokensRequest, server.config)
    server.check_model(asked.model)
    _, ids = await _prompt(request, server, asked)
    return json_response(InputTokens(object="response.input_tokens", input_tokens=len(ids)))


@router.get(
    "/v1/responses/{response_id}",
    **describe(ResponseObject, summary="An answer that is still kept", errors=(400, 404), tags=_TAGS),
)
async def get_response(request: Request, response_id: str) -> Response:
    for name in ("stream", "starting_after", "include", "include[]"):
        if request.query_params.get(name, "false") not in ("false", "False", ""):
            raise ApiError(
                400, f"{name} is not supported here: a kept answer comes whole, as it was made", param=name
            )
    return Response(_stored(request, response_id).body, media_type="application/json")


@router.delete(
    "/v1/responses/{response_id}",
    **describe(DeletedResponse, summary="Forget an answer", errors=(404,), tags=_TAGS),
)
async def delete_response(request: Request, response_id: str) -> Response:
    _stored(request, response_id)
    store_of(request).delete(_owner(request), response_id)
    return json_response(DeletedResponse(id=response_id, object="response", deleted=True))


class Answer:
    """One request on its way to an answer."""

    def __init__(self, server: Server, asked: ResponsesRequest, chat: ChatRequest, ids: list[int], keep: Any) -> None:
        self.server = server
        self.asked = asked
        self.chat = chat
        self.ids = ids
        self.keep = keep  # called with the response once it is whole
        max_calls = 1 if asked.parallel_tool_calls is False else None
        self.machine = ResponseEvents(begin_response(asked, server.check_model(asked.model)), max_calls=max_calls)
        self.names = TokenNames(server.engine.tokenizer)
        self._seen = 0  # tokens whose logprobs have been told

    @classmethod
    async def begin(cls, request: Request, server: Server, asked: ResponsesRequest) -> Answer:
        """Everything that can be refused is refused here."""
        server.check_model(asked.model)
        chat, ids = await _prompt(request, server, asked)
        server.engine.check(ids, answer_params(server.engine, chat))
        store, owner = store_of(request), _owner(request)
        if asked.store and not store.max_responses:
            raise ApiError(400, "this server keeps no responses: send store=false", param="store")

        def keep(response: dict[str, Any]) -> None:
            if asked.store is not False and store.max_responses:
                talk = chat.messages[asked.instructions is not None :]  # instructions hold for one answer
                store.put(owner, response, [*talk, *answer_messages(response)])

        return cls(server, asked, chat, ids, keep)

    async def events(self) -> AsyncIterator[Event]:
        machine = self.machine
        async with aclosing(sound_deltas(self.server.engine, self.chat, self.ids)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                if not machine.has_started:  # not before: until now a refusal had a status of its own
                    for one in machine.start():
                        yield one
                for one in machine.push(delta.text, delta.tool_calls, self._logprobs(delta)):
                    yield one
                reason = "tool_calls" if machine.stream.is_full else delta.finish_reason
                if reason is not None:
                    last = machine.finish(reason, usage_of(delta.update))
                    self.keep(machine.response)
                    for one in last:
                        yield one
                    return

    async def pieces(self) -> AsyncIterator[bytes]:
        """What goes wrong before the first event is raised; later it is told in a last event."""
        try:
            async with aclosing(self.events()) as events:  # type: ignore[type-var]
                async for one in events:
                    yield event(one, one["type"])
        except Exception as error:
            if not self.machine.has_started:
                raise
            if as_api_error(error) is None:
                log.exception("response %s failed", self.machine.response["id"])
            for one in self.machine.fail("server_error", told(error).message):
                yield event(one, one["type"])

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self.events()) as events:  # type: ignore[type-var]
            async for _ in events:
                pass
        return self.machine.response

    def _logprobs(self, delta: ChatDelta) -> list[dict[str, Any]]:
        """Of the delta's tokens; the output itself may be further on already."""
        entries = delta.update.output.outputs[0].logprobs
        if entries is None:
            return []
        begin, self._seen = self._seen, self._seen + len(delta.update.delta_token_ids)
        top = self.asked.top_logprobs or 0
        content: list[dict[str, Any]] = chat_logprobs(entries[begin : self._seen], top, self.names)["content"]
        return content


async def _prompt(request: Request, server: Server, asked: InputTokensRequest) -> tuple[ChatRequest, list[int]]:
    before: tuple[dict[str, Any], ...] = ()
    if asked.previous_response_id is not None:
        before = _previous(request, asked.previous_response_id).messages
    chat = chat_request(asked, before, server)
    if asked.truncation == "auto":
        return await fitting(server.engine, chat)
    return chat, await prompt_ids_aside(server.engine, chat)


def store_of(request: Request) -> ResponseStore:
    state = request.app.state
    if not hasattr(state, "response_store"):
        config = server_of(request).config
        state.response_store = ResponseStore(config.stored_responses, config.stored_response_bytes)
    store: ResponseStore = state.response_store
    return store


def _owner(request: Request) -> str:
    return owner_of(presented_keys(request.headers))


def _stored(request: Request, response_id: str) -> Stored:
    stored = store_of(request).get(_owner(request), response_id)
    if stored is None:
        raise ApiError(404, f"no response {response_id[:80]!r} is kept here", code="response_not_found")
    return stored


def _previous(request: Request, response_id: str) -> Stored:
    try:
        return _stored(request, response_id)
    except ApiError:
        kept = store_of(request).max_responses
        raise ApiError(
            400,
            f"no response {response_id[:80]!r} is kept here (the latest {kept} are): send the conversation as input",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None
