"""The engine in a thread of its own, with the requests on their way through it. Used by ``LLM`` and ``AsyncLLM``.

Callers hand over requests and get snapshots through a callback; a KeyboardInterrupt in the caller's thread can
therefore never tear a step apart.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.engine_loop import EngineLoop, LocalPort
from foretell.errors import ForetellError
from foretell.tracking import Callback, Tracker, Tracking, Update

if TYPE_CHECKING:
    from foretell.store import Tokenizer

__all__ = ["EngineService", "Tracker", "Update"]


class EngineService:
    """Loop and tracking in one thread. ``kv_bytes``: K and V that so many tokens of a request take."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, *, kv_bytes: Callable[[int], int] = lambda tokens: 0
    ) -> None:
        self.engine = engine
        self.tracking = Tracking(LocalPort(engine), tokenizer, kv_bytes)
        self.loop = EngineLoop(engine, self.tracking.take, self._on_stop)
        self._ids = itertools.count()
        self._thread = threading.Thread(target=self.loop.run, name="foretell-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------------

    def submit(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        callback: Callback,
        *,
        arrival: float,
        priority: int = 0,
    ) -> Tracker:
        """Queue a request; ``callback`` is called in the engine's thread with each update."""
        tracker = Tracker(next(self._ids), prompt, prompt_token_ids, params, callback, arrival)
        self.loop.post(lambda: self.tracking.start(tracker, priority))
        return tracker

    def submit_all(
        self,
        requests: Sequence[tuple[str | None, list[int], SamplingParams]],
        callback: Callback,
        *,
        arrival: float,
        priority: int = 0,
    ) -> list[Tracker]:
        """Queue requests together: the first step may take any of them."""
        trackers = [Tracker(next(self._ids), *request, callback, arrival) for request in requests]

        def start() -> None:
            for tracker in trackers:
                self.tracking.start(tracker, priority)

        self.loop.post(start)
        return trackers

    def abort(self, tracker: Tracker) -> None:
        """End a request; its last update has finish_reason "abort". Nothing happens if it has ended."""
        with suppress(ForetellError):  # stopped meanwhile: it has been told already
            self.loop.post(lambda: self.tracking.abort(tracker))

    def call(self, function: Callable[[Engine], Any]) -> Future[Any]:
        """Run a function on the engine between two steps. The future is for who wants to wait, or hear of errors."""
        return self.loop.call(function)

    def close(self) -> None:
        """Stop after the step in progress; unfinished requests are aborted."""
        if not self.loop.close():
            return
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self.engine.executor.close()

    # -- the engine's thread ------------------------------------------------------------------------

    def _on_stop(self, error: BaseException | None) -> None:
        reason = f"the engine stopped: {error}" if error else "the engine was closed"
        self.tracking.fail_all(lambda: ForetellError(reason))
