"""From a chat request to an answer, for the interfaces that are not chat's own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from foretell.errors import UnavailableError
from foretell.server.chat import ChatDelta, ChatRequest, chat_deltas, prompt_ids_aside
from foretell.server.conversation import since, turn_starts
from foretell.server.errors import ApiError

if TYPE_CHECKING:
    from foretell.server.text_engine import TextEngine


async def sound_deltas(engine: TextEngine, chat: ChatRequest, ids: list[int]) -> AsyncIterator[ChatDelta]:
    """The answer's deltas; an answer that the engine could not finish is raised as the error it is."""
    async with aclosing(chat_deltas(engine, chat, ids)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            if delta.finish_reason == "error":
                why = delta.update.output.outputs[delta.index].error or "the engine failed on this request"
                raise ApiError(500, " ".join(why.split()), code="engine_error")
            if delta.finish_reason == "abort":
                raise UnavailableError("the engine gave this request up: send it again")
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
