"""An engine whose requests are counted, whichever route they come from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from time import monotonic
from typing import TYPE_CHECKING, Any

from foretell.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.prompts import Prompt, PromptPreparer
    from foretell.server.metrics import Metrics
    from foretell.server.text_engine import EngineAbout, TextEngine
    from foretell.service import Update
    from foretell.store import Tokenizer

_REASONS = (
    (OverloadedError, "overloaded"),
    (UnavailableError, "unavailable"),
    (DeadlineError, "deadline"),
    (InvalidRequestError, "invalid"),
)


class MeteredEngine:
    """A TextEngine around another."""

    def __init__(self, engine: TextEngine, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics

    @property
    def about(self) -> EngineAbout:
        return self.engine.about

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def preparer(self) -> PromptPreparer:
        return self.engine.preparer

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.engine.check(prompt_token_ids, params)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Update]:
        metrics, left = self.metrics, params.n
        last = [0.0] * params.n  # when each output's last token came
        stream = self.engine.stream(prompt, params, priority=priority, timeout_seconds=timeout_seconds)
        update: Update | None = None
        try:
            async with aclosing(stream) as updates:  # type: ignore[type-var]
                async for update in updates:
                    if tokens := len(update.delta_token_ids):
                        self._token_times(update, tokens, last)
                    if update.finish_reason is not None:
                        left -= 1
                        metrics.ended(update.finish_reason)
                        if left == 0:
                            metrics.finished(update.output, params.n, params.max_tokens)
                    yield update
        except GeneratorExit:  # whoever asked has left
            self._abandoned(left)
            raise
        except Exception as error:
            metrics.failed(next((name for kind, name in _REASONS if isinstance(error, kind)), "internal"))
            raise
        except BaseException:
            self._abandoned(left)
            raise

    def _abandoned(self, left: int) -> None:
        for _ in range(left):
            self.metrics.ended("abort")

    def _token_times(self, update: Update, tokens: int, last: list[float]) -> None:
        """A slow reader gets several tokens in one update: their time is shared among them."""
        now, index = monotonic(), update.index
        if last[index]:
            each = (now - last[index]) / tokens
            for _ in range(tokens):
                self.metrics.observe("inter_token_latency_seconds", each)
        elif index == 0:
            self.metrics.observe("time_to_first_token_seconds", update.output.metrics.ttft_seconds)
        last[index] = now

    async def control(self, command: str, **arguments: Any) -> Any:
        return await self.engine.control(command, **arguments)

    def stats(self) -> Mapping[str, Any]:
        return self.engine.stats()

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready

    @property
    def is_healthy(self) -> bool:
        return self.engine.is_healthy
