"""`foretell bench online`: traffic that does not wait. Requests are sent when they are due, however far behind
the engine is (an open loop), and every latency counts from that moment: a slow engine cannot slow down the
clock it is measured by ("coordinated omission", Tene 2013)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foretell.benchmark.setup import greedy_params
from foretell.benchmark.steps import Record, between_steps, step_records
from foretell.errors import ForetellError
from foretell.trace.metrics import RequestTimes, Spread
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.async_llm import AsyncLLM
    from foretell.core.params import SamplingParams
    from foretell.output import RequestOutput

LEAD_SECONDS = 0.05  # from starting the clock to time 0 of the workload


@dataclass(frozen=True, slots=True)
class OnlineRun:
    """Request times are on the workload's own clock. ``lateness``: seconds from when a request was due to when
    the generator sent it. ``steps``: the engine's records, their times on the same clock."""

    requests: list[RequestTimes]
    lateness: Spread
    steps: list[Record]


def run_open_loop(
    llm: AsyncLLM, workload: Workload, *, variant: int = 0, advance: Callable[[int], None] | None = None
) -> OnlineRun:
    """Send the workload at its own pace and wait for the last answer. ``advance`` hears of each finished
    request with its output tokens."""
    with step_records(llm.llm) as records:
        start, requests, lateness = asyncio.run(_drive(llm, workload, variant, advance))
    for record in records:
        record["started"] -= start
        record["finished"] -= start
    return OnlineRun(requests, Spread.of(lateness), records)


def set_policy(llm: AsyncLLM, name: str) -> None:
    between_steps(llm.llm, lambda engine: engine.set_policy(name))


async def _drive(
    llm: AsyncLLM, workload: Workload, variant: int, advance: Callable[[int], None] | None
) -> tuple[float, list[RequestTimes], list[float]]:
    vocab_size, params = llm.llm.spec.vocab_size, greedy_params(workload)
    start = time.monotonic() + LEAD_SECONDS
    tasks: list[asyncio.Task[RequestTimes]] = []
    lateness = []
    try:
        for index, request in enumerate(workload.requests):
            ids = workload.token_ids(index, vocab_size, variant=variant)  # made while there is time
            due = start + request.arrival_seconds
            await asyncio.sleep(max(0.0, due - time.monotonic()))  # at 0 it still lets the others send
            lateness.append(max(0.0, time.monotonic() - due))
            own = request.arrival_seconds
            tasks.append(asyncio.create_task(_serve(llm, ids, params[index], start, own, advance)))
        return start, list(await asyncio.gather(*tasks)), lateness
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _serve(
    llm: AsyncLLM,
    ids: list[int],
    params: SamplingParams,
    start: float,
    arrival: float,
    advance: Callable[[int], None] | None,
) -> RequestTimes:
    """One request, as its caller lives through it. Refused or failed, it counts as not served."""
    token_times: list[float] = []
    output: RequestOutput | None = None
    error: str | None = None
    try:
        async for update in llm.stream(ids, params):
            now = time.monotonic() - start
            token_times.extend([now] * len(update.delta_token_ids))
            output = update.output
    except ForetellError as reason:
        error = str(reason)
    if advance is not None:
        advance(len(token_times))
    if output is None:
        return RequestTimes(arrival, len(ids), token_times, error=error or "nothing came back")
    scheduled = output.metrics.first_scheduled
    return RequestTimes(
        arrival,
        len(ids),
        token_times,
        first_scheduled=None if scheduled is None else scheduled - start,
        cached_tokens=output.metrics.cached_tokens,
        preemptions=output.metrics.preemptions,
        error=error or output.outputs[0].error,
    )
