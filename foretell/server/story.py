"""What happened to a request, for those who only watch: the log and the traces. Nobody watching costs nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from foretell.server.guard import App, Receive, Scope, Send, header_dict

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.output import RequestMetrics, RequestOutput
    from foretell.prompts import Prompt
    from foretell.server.text_engine import TextEngine
    from foretell.tracking import Update

log = logging.getLogger("foretell.server")


@dataclass(slots=True)
class Generation:
    """One call of the engine. ``output`` is as far as it came."""

    params: SamplingParams
    output: RequestOutput | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class Story:
    """One HTTP request. Times in seconds of ``time.monotonic``, which is the engine's clock too; ``epoch_offset``
    added to them makes Unix time. ``status`` 0: the client left before an answer began."""

    method: str
    path: str
    headers: Mapping[str, str]
    started: float
    epoch_offset: float
    model: str
    request_id: str = ""
    status: int = 0
    ended: float = 0.0
    whole: bool = False  # the answer was sent to its end
    generations: list[Generation] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def outputs(self) -> list[RequestOutput]:
        return [g.output for g in self.generations if g.output is not None]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def output_tokens(self) -> int:
        return sum(len(one.token_ids) for output in self.outputs for one in output.outputs)

    @property
    def cached_tokens(self) -> int:
        return sum(output.metrics.cached_tokens for output in self.outputs)

    @property
    def finish_reasons(self) -> list[str]:
        return [one.finish_reason for output in self.outputs for one in output.outputs if one.finish_reason]

    @property
    def first(self) -> RequestMetrics | None:
        """The times of the generation that spoke first."""
        spoken = [output.metrics for output in self.outputs if output.metrics.first_token is not None]
        return min(spoken, key=lambda metrics: metrics.first_token or 0.0, default=None)


class Observer(Protocol):
    def ended(self, story: Story) -> None:
        """A request is over. Called in the event loop: quickly, please."""
        ...


_story: ContextVar[Story | None] = ContextVar("foretell_story", default=None)


class Storyteller:
    """The middleware around everything, so that refusals are told as well."""

    def __init__(self, app: App, observers: Sequence[Observer], model: str) -> None:
        self.app = app
        self.observers = observers
        self.model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        now = time.monotonic()
        story = Story(scope["method"], scope["path"], header_dict(scope), now, time.time() - now, self.model)

        async def watched(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                story.status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                story.whole = True

        token = _story.set(story)
        try:
            await self.app(scope, receive, watched)
        finally:
            _story.reset(token)
            story.ended = time.monotonic()
            story.request_id = scope.get("request_id", "")
            for observer in self.observers:
                try:
                    observer.ended(story)
                except Exception:
                    log.exception("an observer failed on request %s", story.request_id)


class ObservedEngine:
    """The engine, with each generation written into the story of the request that asked for it."""

    def __init__(self, engine: TextEngine) -> None:
        self.engine = engine
        self.about, self.tokenizer, self.preparer = engine.about, engine.tokenizer, engine.preparer

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.engine.check(prompt_token_ids, params)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, *, priority: int = 0, timeout_seconds: float | None = None
    ) -> AsyncIterator[Update]:
        generation = Generation(params)
        story = _story.get()
        if story is not None:
            story.generations.append(generation)
        updates = self.engine.stream(prompt, params, priority=priority, timeout_seconds=timeout_seconds)
        async with aclosing(updates) as each:  # type: ignore[type-var]
            try:
                async for update in each:
                    generation.output = update.output
                    yield update
            except Exception as error:
                generation.error = error
                raise

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
