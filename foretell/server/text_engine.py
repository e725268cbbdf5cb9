"""What the HTTP layer asks of an engine. ``EngineClient`` answers from another process, tests from this one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.prompts import Prompt, PromptPreparer
    from foretell.service import Update
    from foretell.store import Tokenizer


@dataclass(frozen=True, slots=True)
class EngineAbout:
    """What is being served; constant while the engine runs. Lengths are in tokens."""

    model: str  # the name it was started with
    vocab_size: int
    max_model_len: int  # prompt and answer together
    dtype: str
    created: int  # Unix seconds


class TextEngine(Protocol):
    """Text in, text out. All methods belong to the event loop that runs the server."""

    @property
    def about(self) -> EngineAbout: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def preparer(self) -> PromptPreparer: ...

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """InvalidRequestError if the request could never run. Cheap; nothing is queued."""
        ...

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Update]:
        """Updates as they come, for all ``params.n`` outputs; leaving the iterator aborts within one step.

        Token ids are taken as they are; text is tokenised. Raises, before or between updates: InvalidRequestError,
        OverloadedError, UnavailableError (also when the engine dies), DeadlineError. A failure inside the engine that
        is this request's own comes as an Update with finish_reason "error".
        """
        ...

    async def control(self, command: str, **arguments: Any) -> Any:
        """Run one of the engine's admin commands between two steps: "set_policy" (name=…), "stats"."""
        ...

    def stats(self) -> Mapping[str, Any]:
        """The newest figures of the engine: running, waiting, kv_usage, counters. Never waits."""
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be taken."""
        ...

    @property
    def is_healthy(self) -> bool:
        """Whether the engine stepped, or was idle and answered, in the last seconds."""
        ...
