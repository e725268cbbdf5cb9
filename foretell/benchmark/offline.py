"""`foretell bench offline`: all requests at once, as fast as the engine goes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretell.benchmark.beside import foretold, live_line, profile_of
from foretell.benchmark.setup import Subject, describe, greedy_params, heading, prompts_of, subject_after, subject_of
from foretell.benchmark.steps import StepSummary, step_records, summarize_steps
from foretell.benchmark.tables import number, table
from foretell.trace.workloads import Workload

if TYPE_CHECKING:
    from foretell.llm import LLM
    from foretell.output import RequestOutput

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Walls:
    """Seconds: of the whole workload, and of the same cut to one output token (None where that says nothing)."""

    full: float
    first: float | None

    def ms_per_step(self, output_len: int) -> float | None:
        """(full - first) ÷ (output_len - 1): the decode steps alone, without prefill and constant overheads."""
        return None if self.first is None else 1e3 * (self.full - self.first) / (output_len - 1)


@dataclass(frozen=True, slots=True)
class Measured:
    walls: Walls
    full_walls: list[float]
    first_walls: list[float]
    steps: StepSummary
    cached_tokens: int


def common_output_len(workload: Workload, max_num_seqs: int) -> int | None:
    """The output length that all requests share, when they decode side by side from first to last step."""
    lengths = {request.output_len for request in workload.requests}
    if len(lengths) != 1 or len(workload.requests) > max_num_seqs:
        return None
    length = lengths.pop()
    return length if length > 1 else None


def run(
    llm: LLM, workload: Workload, *, repeat: int, warmup: int, say: Say, progress: bool | None = None
) -> dict[str, Any]:
    """Theory, measurement, ratio; what goes into the JSON line."""
    subject = subject_of(llm)
    subject.check(workload)
    output_len = common_output_len(workload, subject.config.max_num_seqs)
    heading(subject, workload, llm.assembly.kernels, say)
    floor = floor_walls(subject, workload, output_len)
    say(f"floor: {number(floor.full)} s ({number(workload.output_tokens / floor.full)} output tok/s)")
    measured = measure(llm, workload, output_len, repeat=repeat, warmup=warmup, progress=progress)
    better = subject_after(llm, subject, say)
    if better is not subject:
        subject, floor = better, floor_walls(better, workload, output_len)
    predicted = predicted_walls(llm, subject, workload, output_len)
    for line in report_lines(workload, output_len, floor, measured, predicted):
        say(line)
    if line := live_line(llm.assembly.engine.stats()["prediction"]):
        say(line)
    return {
        "bench": "offline",
        **describe(subject, workload, llm.assembly.kernels),
        "repeat": repeat,
        "warmup": warmup,
        **_figures("floor_", workload, output_len, floor),
        **_figures("", workload, output_len, measured.walls),
        **({} if predicted is None else _figures("predicted_", workload, output_len, predicted)),
        "wall_over_floor": measured.walls.full / floor.full,
        "walls_seconds": measured.full_walls,
        "first_token_walls_seconds": measured.first_walls,
        "cached_prompt_tokens": measured.cached_tokens,
        "start_phases_seconds": llm.assembly.phases,
        **measured.steps.as_dict(),
    }


def floor_walls(subject: Subject, workload: Workload, output_len: int | None) -> Walls:
    full = subject.floor(workload).seconds
    return Walls(full, None if output_len is None else subject.floor(workload, max_output_tokens=1).seconds)


def predicted_walls(llm: LLM, subject: Subject, workload: Workload, output_len: int | None) -> Walls | None:
    """What this machine's calibration says of the same runs; None where there is none."""
    profile = profile_of(llm)
    if profile is None:
        return None
    asked = (profile, subject.spec, subject.config, subject.num_blocks, workload)
    full = foretold(*asked)
    first = None if output_len is None else foretold(*asked, max_output_tokens=1)
    return None if full is None else Walls(full.seconds, None if first is None else first.seconds)


def measure(
    llm: LLM, workload: Workload, output_len: int | None, *, repeat: int, warmup: int, progress: bool | None = None
) -> Measured:
    """Medians of ``repeat`` runs, first-token runs between them; only the last one keeps step records.
    With a prefix cache each run gets its own variant of the prompts, so that none lives off another."""
    caching = llm.assembly.engine.scheduler.config.enable_prefix_caching
    variant = 0

    def timed(limit: int | None = None) -> tuple[float, list[RequestOutput]]:
        nonlocal variant
        variant += caching
        prompts = prompts_of(workload, llm.spec.vocab_size, variant)
        params = greedy_params(workload, limit)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, progress=progress)
        return time.perf_counter() - started, outputs

    for _ in range(warmup):
        timed()
    full_walls, first_walls = [], []
    for number_ in range(repeat):
        if output_len is not None:
            first_walls.append(timed(limit=1)[0])
        if number_ < repeat - 1:
            full_walls.append(timed()[0])
    with step_records(llm) as records:
        seconds, outputs = timed()
    full_walls.append(seconds)
    first = statistics.median(first_walls) if first_walls else None
    return Measured(
        Walls(statistics.median(full_walls), first),
        full_walls,
        first_walls,
        summarize_steps(records),
        sum(output.metrics.cached_tokens for output in outputs),
    )


def _figures(prefix: str, workload: Workload, output_len: int | None, walls: Walls) -> dict[str, float | None]:
    return {
        f"{prefix}wall_seconds": walls.full,
        f"{prefix}requests_per_second": len(workload.requests) / walls.full,
        f"{prefix}prompt_tokens_per_second": workload.prompt_tokens / walls.full,
        f"{prefix}output_tokens_per_second": workload.output_tokens / walls.full,
        f"{prefix}first_token_wall_seconds": walls.first,
        f"{prefix}ms_per_decode_step": None if output_len is None else walls.ms_per_step(output_len),
    }


LABELS = {
    "wall_seconds": "wall, s",
    "requests_per_second": "requests/s",
    "prompt_tokens_per_second": "prompt tok/s",
    "output_tokens_per_second": "output tok/s",
    "first_token_wall_seconds": "all first tokens, s",
    "ms_per_decode_step": "ms per decode step",
}


def report_lines(
    workload: Workload, output_len: int | None, floor: Walls, measured: Measured, predicted: Walls | None = None
) -> Sequence[str]:
    best = _figures("", workload, output_len, floor)
    said = {} if predicted is None else _figures("", workload, output_len, predicted)
    real = _figures("", workload, output_len, measured.walls)
    rows = []
    for name, label in LABELS.items():
        low, value = best[name], real[name]
        if low is None or value is None:
            continue
        slower = value / low if name.endswith("seconds") or name.startswith("ms") else low / value
        foreseen = said.get(name)
        off = "" if foreseen is None else f"{number(foreseen)} ({100 * (foreseen / value - 1):+.1f} %)"
        rows.append((label, number(low), *([off] if said else []), number(value), number(slower)))
    steps = measured.steps
    phase_rows = [
        (name, p.steps, f"{p.tokens:,}", number(p.seconds), number(p.tokens_per_second), number(p.ms_per_step))
        for name, p in steps.phases.items()
    ]
    inside = ", ".join(f"{name} {number(seconds)} s" for name, seconds in steps.parts.items())
    return [
        "",
        table(("", "floor", *(["predicted"] if said else []), "measured", "× floor"), rows),
        "",
        table(("steps of the last run", "steps", "tokens", "seconds", "tok/s", "ms/step"), phase_rows),
        f"inside steps: {inside or 'not split'}; between steps: {number(steps.between_seconds)} s",
        f"preemptions: {steps.preemptions}; prompt tokens from the prefix cache: {measured.cached_tokens:,}",
    ]
