"""The asyncio interface: the same engine, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from foretell.core.params import SamplingParams
from foretell.llm import LLM
from foretell.output import RequestOutput
from foretell.prompts import Prompt
from foretell.service import Update


class AsyncLLM:
    """``AsyncLLM(model, …)`` takes what ``LLM`` takes; loading blocks, so build it before the loop is busy."""

    def __init__(
        self, model: str, *, on_event: Callable[[dict[str, Any]], None] | None = None, **options: Any
    ) -> None:
        self.llm = LLM(model, on_event=on_event, **{"interactive": True, **options})

    @classmethod
    def over(cls, llm: LLM) -> AsyncLLM:
        """The asyncio interface of an engine that is there already; closing either closes both."""
        made = cls.__new__(cls)
        made.llm = llm
        return made

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[Update]:
        """Yield updates as they come; cancelling, or leaving the loop, aborts the request."""
        llm = self.llm
        arrival = llm.now
        token_ids = llm._checked_ids(prompt)
        loop = asyncio.get_running_loop()
        updates: asyncio.Queue[Update] = asyncio.Queue()

        def deliver(update: Update) -> None:  # raises when the loop was closed: the request is dropped then
            loop.call_soon_threadsafe(updates.put_nowait, update)

        own = llm.preparer.params(params or SamplingParams())
        prepared = llm.assembly.engine.executor.prepare(own)
        if prepared is not None:  # a grammar is compiled elsewhere; the loop goes on
            await asyncio.wrap_future(prepared)
        text = prompt if isinstance(prompt, str) else None
        tracker = llm.service.submit(text, token_ids, own, deliver, arrival=arrival, priority=priority)
        open_outputs = set(range(own.n))
        try:
            while open_outputs:
                update = await updates.get()
                if update.error is not None:
                    raise update.error
                if update.finish_reason is not None:
                    open_outputs.discard(update.index)
                yield update
        finally:
            if open_outputs:
                llm.service.abort(tracker)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The finished output of one prompt; run many with ``asyncio.gather`` and they are batched together."""
        output: RequestOutput | None = None
        async for update in self.stream(prompt, params, priority=priority):
            output = update.output
        assert output is not None
        return output

    def close(self) -> None:
        self.llm.close()
