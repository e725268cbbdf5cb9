"""The engine's thread: whatever one caller does, the others are served, and nobody waits for ever."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.messages import Batch
from foretell.core.params import SamplingParams
from foretell.errors import ConfigError, ForetellError, InvalidRequestError
from foretell.executor.local import LocalExecutor
from foretell.executor.virtual import LinearCost, VirtualExecutor
from foretell.llm import LLM
from foretell.service import EngineService, Update


class Runner:
    """Synthetic tokens at once."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._virtual = VirtualExecutor(LinearCost(), (1,))

    def release(self) -> None: ...

    def execute(self, batch: Batch) -> Any:
        self._virtual.submit(batch)
        result = self._virtual.wait(None)
        assert result is not None
        return result.results


@pytest.fixture
def service() -> Iterator[EngineService]:
    executor = LocalExecutor(Runner(), (64,))  # type: ignore[arg-type]
    service = EngineService(Engine(SchedulerConfig(), executor), None)
    yield service
    service.close()


def outcome(service: EngineService, **options: Any) -> Update:
    """The last update of a short request."""
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    service.submit(None, [1, 2], SamplingParams(max_tokens=3), updates.put, arrival=0.0, **options)
    while True:
        update = updates.get(timeout=20)
        if update.error is not None or update.finish_reason is not None:
            return update


def test_a_caller_whose_event_loop_is_gone_takes_nobody_along(service: EngineService) -> None:
    def gone(update: Update) -> None:
        raise RuntimeError("Event loop is closed")

    service.submit(None, [1, 2], SamplingParams(max_tokens=2000), gone, arrival=0.0)
    assert outcome(service).finish_reason == "length"
    left: list[int] = []
    service.call(lambda engine: left.append(len(engine.scheduler.requests))).result(20)
    assert left == [0], "generation goes on after the client left"


@pytest.mark.parametrize("priority", ["high", None, float("nan"), 2**70, 0.5])
def test_a_priority_that_is_no_number_is_refused_alone(service: EngineService, priority: Any) -> None:
    update = outcome(service, priority=priority)
    assert isinstance(update.error, InvalidRequestError)
    assert outcome(service).finish_reason == "length"


def test_a_failing_call_is_told_to_its_caller_alone(service: EngineService) -> None:
    with pytest.raises(ConfigError, match="fastest"):
        service.call(lambda engine: engine.set_policy("fastest")).result(20)
    assert outcome(service).finish_reason == "length"


def test_a_caller_that_stops_waiting_for_a_call_takes_nobody_along(service: EngineService) -> None:
    entered, proceed = threading.Event(), threading.Event()

    def hold(engine: Engine) -> None:
        entered.set()
        proceed.wait(20)

    held = service.call(hold)
    assert entered.wait(20)
    left = service.call(lambda engine: engine.stats())
    assert left.cancel()
    assert not held.cancel(), "what runs already cannot be called off"
    proceed.set()
    assert held.result(20) is None
    assert outcome(service).finish_reason == "length"


def test_nothing_can_be_posted_once_the_inbox_has_been_emptied_for_good(service: EngineService) -> None:
    """A submit that finds the engine running must be served or told, however late its post arrives."""
    real, entered, proceed = service.loop._inbox, threading.Event(), threading.Event()

    class SlowInbox:
        def put(self, function: Any) -> None:
            entered.set()
            proceed.wait(0.5)
            real.put(function)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    service.loop._inbox = SlowInbox()  # type: ignore[assignment]
    heard: list[Update | Exception] = []

    def caller() -> None:
        try:
            heard.append(outcome(service))
        except ForetellError as error:
            heard.append(error)

    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    assert entered.wait(20)
    service.close()
    proceed.set()
    thread.join(5)
    assert heard, "the caller waits for ever"


def test_a_stream_yields_its_last_update_however_late_it_comes(service: EngineService) -> None:
    class Late(EngineService):
        def __init__(self) -> None:
            self.finished, self.proceed = threading.Event(), threading.Event()

        def submit(self, prompt: Any, ids: Any, params: Any, callback: Any, **options: Any) -> Any:
            def late(update: Update) -> None:
                if update.finish_reason:
                    self.finished.set()
                    self.proceed.wait(0.5)
                callback(update)

            return service.submit(prompt, ids, params, late, **options)

        def abort(self, tracker: Any) -> None: ...

    llm = LLM.__new__(LLM)
    llm.service = late = Late()
    seen = 0
    for _ in llm._stream(None, [1, 2], SamplingParams(max_tokens=3), 0.0, 0):
        seen += 1
        if seen == 2:
            assert late.finished.wait(20)
    assert seen == 3
