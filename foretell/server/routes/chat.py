"""POST /v1/chat/completions: a conversation in, the assistant's turn out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from foretell.output import RequestOutput
from foretell.server.answers import StreamUsage, raise_if_failed, usage_of
from foretell.server.chat import (
    ChatDelta,
    ChatRequest,
    ToolCallDelta,
    answer_params,
    chat_deltas,
    check_template_kwargs,
    prompt_ids_aside,
)
from foretell.server.chat_input import messages_of, tools_of
from foretell.server.context import Server, request_id_of, server_of
from foretell.server.limits import parse
from foretell.server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.chat import ChatCompletionRequest
from foretell.server.protocol.chat_answers import ChatCompletion, ChatCompletionChunk
from foretell.server.responses import json_response
from foretell.server.sampling import check_count, max_tokens_of, refused, sampling_params
from foretell.server.sse import DONE, EventStream, event, unless_gone

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    **describe(
        ChatCompletion,
        body=ChatCompletionRequest,
        stream=ChatCompletionChunk,
        summary="Answer a conversation",
        errors=ENGINE_ERRORS,
        tags=("generate",),
    ),
)
async def create_chat_completion(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, ChatCompletionRequest, server.config)
    job = await prepare(server, body, request_id_of(request))
    if body.stream:
        return EventStream(job.events(), job.chat.timeout_seconds)
    return json_response(await unless_gone(request.receive, job.whole()))


async def prepare(server: Server, body: ChatCompletionRequest, request_id: str) -> Job:
    """Everything that can be wrong is found here, before anything is queued."""
    model = server.check_model(body.model)
    chat = chat_request(body, server)
    ids = await prompt_ids_aside(server.engine, chat)
    server.engine.check(ids, answer_params(server.engine, chat))
    return Job(server, body, chat, ids, model, request_id)


def chat_request(body: ChatCompletionRequest, server: Server) -> ChatRequest:
    config = server.config
    if body.max_tokens == 0:
        raise refused("max_tokens", "max_tokens must be at least 1")
    if body.stream and body.prompt_logprobs is not None:
        raise refused("prompt_logprobs", "prompt_logprobs needs stream=false: no chunk has a place for them")
    if body.top_logprobs and not body.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs=true")
    kwargs = body.chat_template_kwargs or {}
    check_count("chat_template_kwargs", len(kwargs), config.max_template_kwargs, "entries")
    check_template_kwargs(kwargs)
    tools, choice = tools_of(body.tools, body.tool_choice, config)
    params = sampling_params(
        body,
        config,
        max_tokens=max_tokens_of(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return ChatRequest(
        messages_of(body.messages, config),
        params,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        template_kwargs=kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        priority=body.priority or 0,
        timeout_seconds=server.timeout(body.timeout_seconds),
        max_prompt_chars=config.max_prompt_chars,
    )


@dataclass(slots=True)
class Job:
    """One conversation and its ``n`` answers."""

    server: Server
    body: ChatCompletionRequest
    chat: ChatRequest
    prompt_token_ids: list[int]
    model: str
    request_id: str

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.request_id[4:]}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def names(self) -> TokenNames:
        return TokenNames(self.server.engine.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))

    async def whole(self) -> dict[str, Any]:
        texts = ["" for _ in range(self.chat.params.n)]
        calls: list[dict[int, dict[str, Any]]] = [{} for _ in texts]
        reasons = ["stop" for _ in texts]
        output: RequestOutput | None = None
        async for delta in chat_deltas(self.server.engine, self.chat, self.prompt_token_ids):
            raise_if_failed(delta.update)
            output = delta.update.output
            texts[delta.index] += delta.text
            for call in delta.tool_calls:
                _add_call(calls[delta.index], call)
            reasons[delta.index] = delta.finish_reason or reasons[delta.index]
        if output is None:
            raise RuntimeError("the engine ended a request without a word")
        if self.chat.params.prompt_logprobs is None:
            return self._answer(output, texts, calls, reasons)
        return await asyncio.to_thread(self._answer, output, texts, calls, reasons)  # figures of each prompt token

    def _answer(
        self, output: RequestOutput, texts: list[str], calls: list[dict[int, dict[str, Any]]], reasons: list[str]
    ) -> dict[str, Any]:
        names = self.names()
        choices = [self._choice(i, texts[i], calls[i], reasons[i], output, names) for i in range(len(texts))]
        made = {**self.head("chat.completion"), "choices": choices, "usage": usage_of([output])}
        return {**made, **self._about_prompt(output, names)}

    def _choice(
        self,
        index: int,
        text: str,
        calls: dict[int, dict[str, Any]],
        reason: str,
        output: RequestOutput,
        names: TokenNames,
    ) -> dict[str, Any]:
        done = output.outputs[index]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [calls[i] for i in sorted(calls)]
        made = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(done.logprobs or [], names),
            "finish_reason": reason,
            "stop_reason": done.stop_reason,
        }
        return {**made, "token_ids": done.token_ids} if self.body.return_token_ids else made

    def _logprobs(self, entries: list[Any], names: TokenNames) -> dict[str, Any] | None:
        return chat_logprobs(entries, self.body.top_logprobs or 0, names) if self.body.logprobs else None

    def _about_prompt(self, output: RequestOutput, names: TokenNames) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if self.body.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or (), names)
        if self.body.return_token_ids:
            made["prompt_token_ids"] = output.prompt_token_ids
        return made

    async def events(self) -> AsyncIterator[bytes]:
        head, names, usage = self.head("chat.completion.chunk"), self.names(), StreamUsage(self.body)
        seen = [0] * self.chat.params.n
        begun: set[int] = set()
        async for delta in chat_deltas(self.server.engine, self.chat, self.prompt_token_ids):
            raise_if_failed(delta.update)
            extra = usage.note(0, delta.update.output)
            pieces = b""
            if delta.index not in begun:  # the role first, on its own, as OpenAI does
                begun.add(delta.index)
                role = {"role": "assistant", "content": ""}
                first = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
                more = {"prompt_token_ids": self.prompt_token_ids} if self.body.return_token_ids else {}
                pieces = event({**head, "choices": [first], **extra, **more})
            choice = self._chunk(delta, seen, names)
            if choice is not None:
                pieces += event({**head, "choices": [choice], **extra})
            if pieces:
                yield pieces
        if usage.at_end:
            yield event({**head, "choices": [], "usage": usage.total()})
        yield DONE

    def _chunk(self, delta: ChatDelta, seen: list[int], names: TokenNames) -> dict[str, Any] | None:
        """None if there is nothing to tell: half a character, or what may yet be a tool call."""
        update, index = delta.update, delta.index
        count = len(update.delta_token_ids)
        wants_tokens = self.body.logprobs or self.body.return_token_ids
        if not (delta.text or delta.tool_calls or delta.finish_reason or (wants_tokens and count)):
            seen[index] += count
            return None
        grown: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.tool_calls:
            grown["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
        logprobs = None
        if self.body.logprobs:
            entries = (update.output.outputs[index].logprobs or [])[seen[index] : seen[index] + count]
            logprobs = self._logprobs(entries, names)
        seen[index] += count
        made = {"index": index, "delta": grown, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            made["stop_reason"] = update.output.outputs[index].stop_reason
        if self.body.return_token_ids:
            made["token_ids"] = list(update.delta_token_ids)
        return made


def _add_call(calls: dict[int, dict[str, Any]], delta: ToolCallDelta) -> None:
    call = calls.setdefault(
        delta.index, {"id": delta.id or "", "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["id"] = delta.id or call["id"]
    call["function"]["name"] += delta.name or ""
    call["function"]["arguments"] += delta.arguments


def _call_delta(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    if delta.name is None:
        return {"index": delta.index, "function": function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": {"name": delta.name, **function}}
