"""A workload through the real scheduler in virtual time: what it would take if each step cost so much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foretell.benchmark.recording import Recording
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.messages import Batch
from foretell.core.params import SamplingParams
from foretell.core.request import Request
from foretell.executor.virtual import VirtualExecutor
from foretell.trace.metrics import RequestTimes
from foretell.trace.workloads import Workload


@dataclass(frozen=True, slots=True)
class VirtualRun:
    """Requests in the order of the workload; ``seconds`` from time 0 to the last token."""

    requests: list[RequestTimes]
    seconds: float
    steps: int


def simulate(
    workload: Workload,
    vocab_size: int,
    config: SchedulerConfig,
    num_blocks: tuple[int, ...],
    windows: Sequence[int | None],
    cost: Callable[[Batch], float],
    *,
    max_output_tokens: int | None = None,
    overlaps: bool = False,
    recording: Recording | None = None,
) -> VirtualRun:
    """Serve the workload with an engine of this configuration whose steps take what ``cost`` says. ``overlaps``: as a
    device does it, with the next step planned while one runs."""
    executor = VirtualExecutor(cost, num_blocks, depth=2 if overlaps else 1, chain=1 if overlaps else 0)
    engine = Engine(config, executor, windows)
    if recording is not None:
        recording.watch(engine)
    admitted: list[Request] = []
    times: list[list[float]] = []
    arrivals = [request.arrival_seconds for request in workload.requests]
    while len(admitted) < len(arrivals) or engine.has_work:
        while len(admitted) < len(arrivals) and arrivals[len(admitted)] <= executor.now:
            index = len(admitted)
            output_len = min(workload.requests[index].output_len, max_output_tokens or 2**62)
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            ids = workload.token_ids(index, vocab_size)
            admitted.append(engine.add(index, ids, params, arrival=arrivals[index]))
            times.append([])
        until = arrivals[len(admitted)] if len(admitted) < len(arrivals) else None
        before = executor.now
        if stretch := engine.run_ahead(until):
            if recording is not None:
                recording.stretch(stretch, before)
            for request_id in stretch.request_ids:
                times[request_id] += stretch.finished
            continue
        for output in engine.step(until):
            if output.token_id is not None:
                times[output.request_id].append(executor.now)
    return VirtualRun(
        [_times(r, t) for r, t in zip(admitted, times, strict=True)], executor.now, engine.scheduler.num_batches
    )


def _times(request: Request, token_times: list[float]) -> RequestTimes:
    return RequestTimes(
        request.arrival,
        request.prompt_len,
        token_times,
        first_scheduled=request.first_scheduled,
        cached_tokens=request.cached_tokens,
        preemptions=request.preemptions,
    )
