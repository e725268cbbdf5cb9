"""POST /v1/completions: text or token ids in, text out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from foretell.core.params import SamplingParams
from foretell.output import RequestOutput
from foretell.server.answers import StreamUsage, raise_if_failed, token_ids, usage_of
from foretell.server.context import Server, request_id_of, server_of
from foretell.server.limits import parse
from foretell.server.logprobs import LegacyLogprobs, TokenNames, prompt_logprobs
from foretell.server.merge import merged
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.completions import CompletionChunk, CompletionRequest, CompletionResponse
from foretell.server.responses import json_response
from foretell.server.sampling import check_count, max_tokens_of, refused, sampling_params
from foretell.server.sse import DONE, EventStream, event, unless_gone
from foretell.service import Update

router = APIRouter()


@router.post(
    "/v1/completions",
    **describe(
        CompletionResponse,
        body=CompletionRequest,
        stream=CompletionChunk,
        summary="Complete text",
        errors=ENGINE_ERRORS,
        tags=("generate",),
    ),
)
async def create_completion(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, CompletionRequest, server.config)
    job = await prepare(server, body, request_id_of(request))
    if body.stream:
        return EventStream(job.events(), job.timeout_seconds)
    return json_response(await unless_gone(request.receive, job.whole()))


async def prepare(server: Server, body: CompletionRequest, request_id: str) -> Job:
    """Everything that can be wrong is found here, before anything is queued."""
    config, engine = server.config, server.engine
    model = server.check_model(body.model)
    max_tokens = max_tokens_of(body)
    max_tokens = 16 if max_tokens is None else max_tokens
    if max_tokens == 0 and not body.echo:
        raise refused("max_tokens", "max_tokens=0 needs echo=true: there would be no answer")
    params = sampling_params(body, config, max_tokens=max_tokens or 1, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    prompts: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        prompts = [prompts]
    check_count("prompt", len(prompts), config.max_prompts, "entries")
    check_count("n", len(prompts) * params.n, config.max_outputs, "outputs in all prompts together")
    special = body.add_special_tokens is not False
    ids = [await token_ids(engine, prompt, special, config.max_prompt_chars) for prompt in prompts]
    for one in ids:
        engine.check(one, params)
    return Job(server, body, params, prompts, ids, model, request_id, server.timeout(body.timeout_seconds))


@dataclass(slots=True)
class Job:
    """One request: its prompts, each with ``n`` outputs. Choice number = prompt · n + output."""

    server: Server
    body: CompletionRequest
    params: SamplingParams
    prompts: list[Any]
    prompt_token_ids: list[list[int]]
    model: str
    request_id: str
    timeout_seconds: float | None

    def head(self) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.request_id[4:]}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
        }

    def updates(self) -> AsyncIterator[tuple[int, Update]]:
        return merged(
            [
                self.server.engine.stream(
                    ids, self.params, priority=self.body.priority or 0, timeout_seconds=self.timeout_seconds
                )
                for ids in self.prompt_token_ids
            ]
        )

    def writers(self) -> dict[tuple[int, int], ChoiceWriter]:
        names = TokenNames(self.server.engine.tokenizer, as_ids=bool(self.body.return_tokens_as_token_ids))
        return {
            (p, i): ChoiceWriter(self, p, i, names) for p in range(len(self.prompts)) for i in range(self.params.n)
        }

    async def whole(self) -> dict[str, Any]:
        outputs: dict[int, RequestOutput] = {}
        async for number, update in self.updates():
            raise_if_failed(update)
            outputs[number] = update.output
        if self.params.prompt_logprobs is None:
            return self._answer(outputs)
        return await asyncio.to_thread(self._answer, outputs)  # figures of each prompt token: others need not wait

    def _answer(self, outputs: dict[int, RequestOutput]) -> dict[str, Any]:
        choices = []
        for (number, index), writer in self.writers().items():
            output = outputs[number]
            done = output.outputs[index]
            choices.append(writer.choice(Update(output, index, done.text, done.token_ids, done.finish_reason)))
        usage = usage_of(outputs.values(), count_completion=self.body.max_tokens != 0)
        return {**self.head(), "choices": choices, "usage": usage}

    async def events(self) -> AsyncIterator[bytes]:
        head, writers, usage = self.head(), self.writers(), StreamUsage(self.body)
        async for number, update in self.updates():
            raise_if_failed(update)
            extra = usage.note(number, update.output)
            choice = writers[number, update.index].choice(update)
            if choice is not None:
                yield event({**head, "choices": [choice], **extra})
        if usage.at_end:
            total = usage.total(count_completion=self.body.max_tokens != 0)
            yield event({**head, "choices": [], "usage": total})
        yield DONE


class ChoiceWriter:
    """Updates of one output → choices: all of it, or piece by piece."""

    def __init__(self, job: Job, number: int, index: int, names: TokenNames) -> None:
        self.job = job
        self.number = number
        self.index = number * job.params.n + index
        self.names = names
        self.legacy = LegacyLogprobs(names)
        self.seen = 0  # tokens
        self.begun = False

    def choice(self, update: Update) -> dict[str, Any] | None:
        """None if there is nothing to tell."""
        body, output = self.job.body, update.output
        text: str = update.delta_text
        ids, entries = list(update.delta_token_ids), []
        if body.logprobs is not None:
            entries = list((output.outputs[update.index].logprobs or ())[self.seen : self.seen + len(ids)])
        self.seen += len(ids)
        if body.max_tokens == 0:  # the prompt was all that was asked for
            text, ids, entries = "", [], []
        first, self.begun = not self.begun, True
        if first and body.echo:
            text = self._prompt_text() + text
        wanted = body.logprobs is not None or body.return_token_ids
        if not (text or update.finish_reason or (first and body.echo) or (wanted and ids)):
            return None
        made = {
            "index": self.index,
            "text": text,
            "logprobs": None if body.logprobs is None else self._logprobs(output, ids, entries, first),
            "finish_reason": "length" if update.finish_reason and body.max_tokens == 0 else update.finish_reason,
            "stop_reason": output.outputs[update.index].stop_reason if update.finish_reason else None,
        }
        if first and body.prompt_logprobs is not None:
            made["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or (), self.names)
        if body.return_token_ids:
            made["token_ids"] = ids
            if first:
                made["prompt_token_ids"] = output.prompt_token_ids
        return made

    def _logprobs(self, output: RequestOutput, ids: list[int], entries: list[Any], first: bool) -> dict[str, Any]:
        if first and self.job.body.echo:
            prompt_ids = output.prompt_token_ids
            return self.legacy.take([*prompt_ids, *ids], [*(output.prompt_logprobs or ()), *entries])
        return self.legacy.take(ids, entries)

    def _prompt_text(self) -> str:
        prompt = self.job.prompts[self.number]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.job.server.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt)
