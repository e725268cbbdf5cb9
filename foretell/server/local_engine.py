"""The engine in this process: a TextEngine around AsyncLLM, for tests and simple use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from foretell.errors import DeadlineError, OverloadedError, UnavailableError
from foretell.server.commands import Commands
from foretell.server.text_engine import EngineAbout

if TYPE_CHECKING:
    from foretell.async_llm import AsyncLLM
    from foretell.core.params import SamplingParams
    from foretell.prompts import Prompt
    from foretell.service import Update


class LocalTextEngine:
    """Wraps an AsyncLLM. A step that crashes takes this engine along: for anything serious use its own process."""

    def __init__(self, llm: AsyncLLM, *, max_queue: int = 1024) -> None:
        self.llm = llm
        self.max_queue = max_queue
        self.unfinished = 0
        self._commands = Commands(llm.llm.assembly.engine)
        self.tokenizer = llm.llm.tokenizer
        self.preparer = llm.llm.preparer
        assembly = llm.llm.assembly
        self.about = EngineAbout(
            model=assembly.options.model,
            vocab_size=llm.llm.spec.vocab_size,
            max_model_len=assembly.max_model_len,
            dtype=assembly.dtype,
            created=int(time.time()),
        )

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.llm.llm.assembly.engine.scheduler.check_prompt_len(len(prompt_token_ids))
        self.preparer.token_ids(prompt_token_ids)
        self.preparer.params(params)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Update]:
        if not self.is_ready:
            raise UnavailableError("the engine has stopped: start the server again")
        if self.unfinished >= self.max_queue:
            raise OverloadedError(f"{self.unfinished} requests are unfinished, as many as are allowed", 1.0)
        self.unfinished += 1
        deadline = None if timeout_seconds is None else asyncio.get_running_loop().time() + timeout_seconds
        updates = self.llm.stream(prompt, params, priority=priority)
        try:
            while True:
                # around each wait rather than the whole loop: what the caller does between two updates is its own
                async with asyncio.timeout_at(deadline):
                    update = await anext(updates, None)
                if update is None:
                    return
                yield update
        except TimeoutError:
            raise DeadlineError(f"the request was not finished within {timeout_seconds:g} s") from None
        finally:
            self.unfinished -= 1
            await updates.aclose()  # type: ignore[attr-defined]

    async def control(self, command: str, **arguments: Any) -> Any:
        answer = self.llm.llm.service.call(lambda engine: self._commands.run(command, arguments))
        return await asyncio.wrap_future(answer)

    def stats(self) -> Mapping[str, Any]:
        return self.llm.llm.assembly.engine.stats()

    @property
    def is_ready(self) -> bool:
        return self.llm.llm.service.loop.is_running

    @property
    def is_healthy(self) -> bool:
        return self.is_ready

    def close(self) -> None:
        self.llm.close()
