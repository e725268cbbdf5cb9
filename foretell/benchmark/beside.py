"""What the cost model foretold of a run beside what was measured, where this machine was calibrated for the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretell.benchmark.simulate import VirtualRun, simulate
from foretell.benchmark.tables import milliseconds, table
from foretell.config import ModelSpec, SchedulerConfig
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import BeyondProfileError
from foretell.cost.profile import Profile
from foretell.cost.step import StepCost
from foretell.cost.watch import StepWatch
from foretell.trace.metrics import Report
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.llm import LLM

COMPARED = {"ttft_seconds": "TTFT", "tpot_seconds": "TPOT", "e2e_seconds": "E2E"}
PERCENTILES = {"p50": "P50", "p90": "P90", "p99": "P99"}


def profile_of(llm: LLM) -> Profile | None:
    """The calibration that the engine's steps are compared with."""
    watcher = llm.assembly.engine.watcher
    return watcher.profile if isinstance(watcher, StepWatch) else None


def foretold(
    profile: Profile,
    spec: ModelSpec,
    config: SchedulerConfig,
    num_blocks: tuple[int, ...],
    workload: Workload,
    *,
    max_output_tokens: int | None = None,
) -> VirtualRun | None:
    """The workload in virtual time; None where the profile does not reach."""
    windows = [group.window for group in spec.kv_groups]
    try:
        return simulate(
            workload, spec.vocab_size, config, num_blocks, windows, StepCost(profile),
            max_output_tokens=max_output_tokens, overlaps=profile.overlaps,
        )  # fmt: skip
    except BeyondProfileError:
        return None


def relative_error(predicted: float, measured: float) -> float:
    return predicted / measured - 1 if measured else 0.0


def errors(predicted: Report, measured: Report) -> dict[str, float]:
    """ "ttft_seconds.p50" … and "output_tokens_per_second" → predicted ÷ measured - 1."""
    found = {}
    for name in COMPARED:
        mine, theirs = getattr(predicted, name), getattr(measured, name)
        if mine.count and theirs.count:
            for column in PERCENTILES:
                found[f"{name}.{column}"] = relative_error(getattr(mine, column), getattr(theirs, column))
    throughput = predicted.output_tokens_per_second, measured.output_tokens_per_second
    found["output_tokens_per_second"] = relative_error(*throughput)
    return found


def comparison(predicted: Report, measured: Report) -> str:
    """A row per latency: predicted → measured and the error, at each percentile; then the rates."""
    off = errors(predicted, measured)
    rows = []
    for name, label in COMPARED.items():
        if f"{name}.p50" not in off:
            continue
        row = [label]
        for column in PERCENTILES:
            pair = getattr(getattr(predicted, name), column), getattr(getattr(measured, name), column)
            row.append(f"{milliseconds(pair[0])} / {milliseconds(pair[1])} ({100 * off[f'{name}.{column}']:+.1f} %)")
        rows.append(row)
    rate = predicted.output_tokens_per_second, measured.output_tokens_per_second
    header = ["predicted / measured, ms", *PERCENTILES.values()]
    return (
        f"{table(header, rows)}\noutput tok/s: {rate[0]:.1f} predicted, {rate[1]:.1f} measured "
        f"({100 * off['output_tokens_per_second']:+.1f} %)"
    )


@dataclass(frozen=True, slots=True)
class RequestForetold:
    """One request alone on an idle engine: from admission to its first token, then per token."""

    ttft_seconds: float
    tpot_seconds: float | None


def foretold_request(
    profile: Profile, prompt_tokens: int, output_tokens: int, *, cached_tokens: int = 0, budget: int = 2048
) -> RequestForetold | None:
    """``budget``: most tokens of a step. None where the profile does not reach."""
    cost, ttft = StepCost(profile), 0.0
    try:
        for start in range(cached_tokens, prompt_tokens, budget):
            length = min(budget, prompt_tokens - start)
            ttft += cost.estimate([ChunkShape(start, length, start + length == prompt_tokens)]).seconds
        steps = cost.decode_seconds([prompt_tokens])
        decodes = [next(steps) for _ in range(output_tokens - 1)]
    except BeyondProfileError:
        return None
    return RequestForetold(ttft, sum(decodes) / len(decodes) if decodes else None)


def live_line(figures: Mapping[str, Any] | None) -> str:
    """The live check in a line; "" where nothing was compared."""
    if not figures or not figures["steps"]:
        return ""
    return (
        f"{figures['steps']:,} steps compared with their predictions: median error "
        f"{100 * figures['median_error']:.1f} %, P90 {100 * figures['p90_error']:.1f} % over the last ones, "
        f"{100 * figures['inside_interval']:.0f} % within the interval; drift {100 * figures['drift']:+.1f} %"
    )
