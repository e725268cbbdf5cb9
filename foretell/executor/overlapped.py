"""The overlapped executor: the device computes one batch while the CPU takes in the last and plans the next."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from foretell.core.messages import Batch, ChunkResult, Result
from foretell.core.params import SamplingParams
from foretell.executor.local import failure_reason
from foretell.executor.prepare import prepare_grammar

if TYPE_CHECKING:
    from concurrent.futures import Future

    from foretell.grammar.compiler import GrammarCompiler
    from foretell.worker.device_runner import DeviceRunner
    from foretell.worker.device_step import Step


class OverlappedExecutor:
    """Two batches in flight, one token chained: ``submit`` enqueues the work and returns."""

    depth = 2
    chain = 1

    def __init__(self, runner: DeviceRunner, num_blocks: tuple[int, ...]) -> None:
        self.runner = runner
        self.grammars: GrammarCompiler | None = None
        self.num_blocks = num_blocks
        self._queue: deque[tuple[Batch, Step | Exception, float]] = deque()
        self._woken = threading.Event()
        self._last_finished = 0.0

    @property
    def now(self) -> float:
        return time.monotonic()

    def use_grammars(self, grammars: GrammarCompiler) -> None:
        self.grammars = self.runner.grammars = grammars

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        return prepare_grammar(self.grammars, params)

    def submit(self, batch: Batch) -> None:
        started = self.now
        step: Step | Exception
        try:
            step = self.runner.submit(batch)
        except Exception as error:  # this batch's requests end with a reason; the engine and the others go on
            step = error
        self._queue.append((batch, step, started))

    def wait(self, until: float | None) -> Result | None:
        if not self._queue:
            timeout = None if until is None or until == math.inf else max(0.0, until - self.now)
            self._woken.wait(timeout)
            self._woken.clear()
            return None
        batch, step, started = self._queue.popleft()
        waited = self.now
        parts: dict[str, float] = {}
        try:
            if isinstance(step, Exception):
                raise step
            results = self.runner.collect(step)
            parts = {"launch": step.launched_seconds, "wait": self.now - waited}
        except Exception as error:
            results = [ChunkResult(chunk.request_id, error=failure_reason(error)) for chunk in batch.chunks]
        started, self._last_finished = max(started, self._last_finished), self.now
        return Result(batch.id, results, started, self._last_finished, parts)

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._queue.clear()
        if self.grammars is not None:
            self.grammars.close()
        self.runner.release()
