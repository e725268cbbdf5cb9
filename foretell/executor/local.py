"""The local executor: one process, one model runner, real time."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from foretell.core.messages import Batch, ChunkResult, Result
from foretell.core.params import SamplingParams
from foretell.executor.prepare import prepare_grammar

if TYPE_CHECKING:
    from concurrent.futures import Future

    from foretell.grammar.compiler import GrammarCompiler
    from foretell.worker.runner import ModelRunner


class LocalExecutor:
    """Runs each batch when it is waited for, in the caller's thread: one batch in flight, nothing chained."""

    depth = 1
    chain = 0

    def __init__(self, runner: ModelRunner, num_blocks: tuple[int, ...]) -> None:
        self.runner = runner
        self.grammars: GrammarCompiler | None = None
        self.num_blocks = num_blocks
        self._queue: deque[Batch] = deque()
        self._woken = threading.Event()

    @property
    def now(self) -> float:
        return time.monotonic()

    def use_grammars(self, grammars: GrammarCompiler) -> None:
        self.grammars = self.runner.grammars = grammars

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        return prepare_grammar(self.grammars, params)

    def submit(self, batch: Batch) -> None:
        self._queue.append(batch)

    def wait(self, until: float | None) -> Result | None:
        if not self._queue:
            timeout = None if until is None or until == math.inf else max(0.0, until - self.now)
            self._woken.wait(timeout)
            self._woken.clear()
            return None
        batch = self._queue.popleft()
        started = self.now
        try:
            results = self.runner.execute(batch)
        except Exception as error:  # this batch's requests end with a reason; the engine and the others go on
            results = [ChunkResult(chunk.request_id, error=failure_reason(error)) for chunk in batch.chunks]
        return Result(batch.id, results, started, self.now, self.runner.parts)

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self._queue.clear()
        if self.grammars is not None:
            self.grammars.close()
        self.runner.release()


def failure_reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in ("can't allocate memory", "out of memory")):
        return "out of memory while computing this step: lower max_num_batched_tokens or kv_cache_bytes"
    return f"computing this step failed: {type(error).__name__}: {text.splitlines()[0] if text else ''}"
