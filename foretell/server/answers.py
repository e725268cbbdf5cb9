"""What all generating endpoints do with the engine's updates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from foretell.errors import UnavailableError
from foretell.server.chat import check_prompt_chars
from foretell.server.errors import ApiError

if TYPE_CHECKING:
    from foretell.output import RequestOutput
    from foretell.prompts import Prompt
    from foretell.server.protocol.sampling import SamplingFields
    from foretell.server.text_engine import TextEngine
    from foretell.service import Update

_THREAD_CHARS = 20_000


def raise_if_failed(update: Update) -> None:
    """A request that the engine gave up on has no answer."""
    if update.finish_reason == "error":
        why = update.output.outputs[update.index].error or "no reason was given"
        raise ApiError(500, f"the engine failed on this request: {why.splitlines()[0]}", code="engine_error")
    if update.finish_reason == "abort":
        raise UnavailableError("the engine ended this request before it was done: send it again")


async def token_ids(engine: TextEngine, prompt: Prompt, add_special_tokens: bool, max_chars: int) -> list[int]:
    """Tokenised, and in a thread where that takes long."""
    if not isinstance(prompt, str):
        return engine.preparer.token_ids(prompt)
    check_prompt_chars(len(prompt), max_chars)
    if len(prompt) <= _THREAD_CHARS:
        return engine.preparer.token_ids(prompt, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(engine.preparer.token_ids, prompt, add_special_tokens=add_special_tokens)


def usage_of(outputs: Iterable[RequestOutput], *, count_completion: bool = True) -> dict[str, Any]:
    """OpenAI's usage object over a request's prompts."""
    prompt = completion = cached = 0
    for output in outputs:
        prompt += len(output.prompt_token_ids)
        cached += output.metrics.cached_tokens
        if count_completion:
            completion += sum(len(choice.token_ids) for choice in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class StreamUsage:
    """The usage that a stream's chunks carry: null, or so far, and all of it at the end."""

    def __init__(self, fields: SamplingFields) -> None:
        options = fields.stream_options
        self.at_end = bool(options and options.include_usage)
        self.always = bool(options and options.continuous_usage_stats)
        self._outputs: dict[int, RequestOutput] = {}

    def note(self, number: int, output: RequestOutput) -> dict[str, Any]:
        """What to add to a chunk made from ``output``, the state of prompt ``number``."""
        if not (self.at_end or self.always):
            return {}
        self._outputs[number] = output
        return {"usage": usage_of(self._outputs.values()) if self.always else None}

    def total(self, *, count_completion: bool = True) -> dict[str, Any]:
        return usage_of(self._outputs.values(), count_completion=count_completion)
