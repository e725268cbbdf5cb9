"""Measure the engine's own steps on this machine and turn them into a profile.

Steps are run on the engine's worker as the engine would run them, with batches made to order: tokens without a past
for the linear layers, the same with sampling for the head, one token with a long past for decode attention, chunks
for prefill attention. What a component takes is the difference to the step without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import foretell
from foretell.async_llm import AsyncLLM
from foretell.benchmark.online import run_open_loop
from foretell.benchmark.steps import Record, step_records
from foretell.core.params import SamplingParams
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import Curve, Surface
from foretell.cost.heldout import with_held_out
from foretell.cost.machine import device_key, machine_name
from foretell.cost.pace import Pace
from foretell.cost.profile import Profile, attended
from foretell.cost.stepping import PIECE, Shape, StepBench, decodes, rows
from foretell.cpus import usable_cpus
from foretell.errors import ConfigError
from foretell.memory import resident_bytes
from foretell.trace.workloads import TraceRequest, Workload

if TYPE_CHECKING:
    from foretell.llm import LLM

Report = Callable[[int, int, str], None]  # points done, points in all, what is being measured
Pairs = tuple[tuple[int, int], ...]
Key = tuple[int, ...]  # a point of the grid
Job = tuple[str, Key, Callable[[], float | None]]  # component, point, how to measure it
HOST_PROMPT, HOST_OUTPUT = 8, 24  # tokens of the requests that the host's part is measured with
ROUNDS = 3
ROUNDS_SECONDS = 150.0  # rounds after the first end then, complete or not
LOOK_EVERY = 3  # points between two looks at how fast the machine is


@dataclass(frozen=True, slots=True)
class Grid:
    """Where to measure: tokens of a step, sampled rows, (sequences, keys of each), (chunk, tokens before it)."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    decode: Pairs
    prefill: Pairs
    host: tuple[int, ...]
    held_out: int

    @property
    def points(self) -> int:
        return len(self.tokens) + len(self.rows) + len(self.decode) + len(self.prefill)


CPU_GRID = Grid(  # kernels have tiles of 6
    tokens=(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13, 16, 18, 19, 24, 25, 32, 48, 64, 128, 256, 512, 1024, 2048),
    rows=(1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 18, 19, 24, 32, 64),
    decode=tuple((n, keys) for n in (1, 2, 4, 8, 16, 64) for keys in (64, 512, 2048, 8192)),
    prefill=tuple((length, start) for length in (32, 128, 512, 1024) for start in (0, 512, 2048, 6144)),
    host=(1, 8, 32),
    held_out=120,  # a sixth of them judges decode steps: the extremes of 20 hold 19 of 21 further ones
)
DEVICE_GRID = Grid(
    tokens=(32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    rows=(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512),
    decode=tuple((n, keys) for n in (1, 8, 32, 128, 256, 512) for keys in (64, 512, 2048, 8192, 16384)),
    prefill=tuple((length, start) for length in (64, 256, 1024, 4096, 8192, 15360) for start in (0, 512, 4096)),
    host=(1, 8, 32, 128, 256, 512),
    held_out=60,
)


def calibrate(llm: LLM, report: Report = lambda done, total, what: None, grid: Grid | None = None) -> Profile:
    """Some three minutes, five at most. Runs in the engine's own thread; the engine serves nobody meanwhile."""
    bench = StepBench(llm)
    grid = grid or (CPU_GRID if bench.device is None else DEVICE_GRID)
    measuring = _Measuring(bench, grid, lambda done, what: report(done, grid.points + grid.held_out, what))
    result: list[Profile] = []
    llm.service.call(lambda engine: result.append(measuring.profile(llm))).result()
    most = max(n for n, _ in grid.decode)
    profile = with_held_out(
        llm, result[0], grid.held_out, most,
        lambda done, what: report(grid.points + done, grid.points + grid.held_out, what),
    )  # fmt: skip
    return replace(profile, host=host_curve(llm, grid.host))


class _Measuring:
    """The grid, component by component, in the engine's thread.

    Every point is measured once in each of several rounds, and has the median of them: who else uses the machine for
    a minute is met by all points in one round, not by some in all. A reference step between them tells how fast the
    machine is at the moment, and what was measured while it was slower counts for less.
    """

    def __init__(self, bench: StepBench, grid: Grid, report: Callable[[int, str], None]) -> None:
        self.bench = bench
        self.grid = grid
        self.pace = Pace(bench)
        self._report = report

    def profile(self, llm: LLM) -> Profile:
        import torch

        bench = self.bench
        bench.fill_cache()
        process = process_bytes(llm, bench)
        found = self._measured(self._jobs())
        head = Curve.of([(float(key[0]), seconds) for key, seconds in found["head"].items()])
        linear = self._linear(found["linear"], head)
        own_linear = self._decode_linear(found["decode linear"], head)
        decode, prefill = found["decode attention"], found["prefill attention"]
        if not (linear and head.x and decode and prefill):
            raise ConfigError("nothing could be measured: the KV cache is too small, raise kv_cache_bytes")
        graphs = getattr(bench.device, "graphs", None)
        threads = 0 if llm.assembly.device == "cuda" else llm.assembly.options.num_threads or usable_cpus()
        return Profile(
            model=llm.assembly.files.name,
            spec=bench.spec,
            dtype=llm.assembly.dtype,
            weight_format=llm.assembly.weight_format,
            kernels=llm.assembly.kernels,
            hardware=machine_name(llm.assembly.device, threads),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"foretell": foretell.__version__, "torch": torch.__version__.partition("+")[0]},
            block_size=bench.block_size,
            linear=Curve.of(linear),
            head=head,
            host=Curve.of([(1.0, 0.0)]),
            decode_rate=Surface.of([self._decode_rate(n, keys, t) for (n, keys), t in decode.items()]),
            prefill_rate=Surface.of([self._prefill_rate(n, start, t) for (n, start), t in prefill.items()]),
            low=1.0,
            high=1.0,
            median_error=0.0,
            held_out=[],
            device=device_key(llm.assembly.device),
            overlaps=bench.device is not None,
            decode_linear=own_linear,
            graph_sizes=tuple(getattr(graphs, "sizes", ())),
            num_threads=threads,
            eager_seconds=statistics.median(bench.launches) if graphs and bench.launches else 0.0,
            reference_seconds=self.pace.usual,
            weight_bytes=llm.assembly.weight_bytes,
            process_bytes=process,
        )

    def _measured(self, jobs: Sequence[Job]) -> dict[str, dict[Key, float]]:
        """By component and point; points that do not fit, or take too long, are left out."""
        rounds, begun = ROUNDS if self.bench.device is None else 1, time.monotonic()
        values: dict[tuple[str, Key], list[tuple[float, float]]] = {}
        for done in range(rounds):
            for number, (what, key, measure) in enumerate(jobs):
                self._report(round((done + number / len(jobs)) * self.grid.points / rounds), what)
                late = time.monotonic() - begun > ROUNDS_SECONDS
                if done and (late or (what, key) not in values):
                    continue
                pace = self.pace.look() if number % LOOK_EVERY == 0 else self.pace.last
                if (seconds := measure()) is not None:
                    values.setdefault((what, key), []).append((seconds, pace))
        found: dict[str, dict[Key, float]] = {"decode linear": {}, **{what: {} for what, _, _ in jobs}}
        for (what, key), own in values.items():
            found[what][key] = statistics.median(self.pace.steady(seconds, pace) for seconds, pace in own)
        return found

    def _jobs(self) -> list[Job]:
        grid, bench, on_device = self.grid, self.bench, self.bench.device is not None
        jobs: list[Job] = []
        for count in grid.rows:
            bare, sampled = rows(count, sample=False), rows(count, sample=True)
            if on_device:  # where no step goes without the head
                jobs.append(("head", (count,), partial(bench.head_seconds, count)))
                jobs.append(("decode linear", (count,), partial(bench.seconds, sampled)))
            else:
                jobs.append(("head", (count,), partial(bench.beyond, sampled, bare)))
        fitting = [tokens for tokens in grid.tokens if tokens <= bench.max_tokens]
        jobs += [("linear", (tokens,), partial(bench.seconds, self._plain(tokens))) for tokens in fitting]
        for count, keys in grid.decode:
            shapes = decodes(count, keys), rows(count, sample=True)
            jobs.append(("decode attention", (count, keys), partial(bench.beyond, *shapes)))
        for length, start in grid.prefill:
            base = bench.pieces(length)
            if PIECE < length <= bench.max_tokens and len(base) > 1:
                chunk = (ChunkShape(start, length, False),)
                jobs.append(("prefill attention", (length, start), partial(bench.beyond, chunk, base)))
        return jobs

    def _plain(self, tokens: int) -> Shape:
        """As the tokens of a decode step up to its usual size, then of prompts; on a device always of prompts."""
        if self.bench.device is None and tokens <= self.grid.rows[-1]:
            return rows(tokens, sample=False)
        return self.bench.pieces(tokens)

    def _linear(self, found: dict[Key, float], head: Curve) -> list[tuple[float, float]]:
        """Everything that sees each token alone, by tokens."""
        on_device = self.bench.device is not None and bool(head.x)
        return [
            (float(tokens), max(0.0, seconds - (head(len(self._plain(tokens))) if on_device else 0.0)))
            for (tokens, *_), seconds in found.items()
        ]

    def _decode_linear(self, found: dict[Key, float], head: Curve) -> Curve | None:
        """The same for decode steps on a device, at the sizes that graphs have."""
        points = [(float(key[0]), max(0.0, seconds - head(key[0]))) for key, seconds in found.items()]
        return Curve.of(points) if points else None

    def _decode_rate(self, count: int, keys: int, seconds: float) -> tuple[float, float, float]:
        """(sequences, keys of each, seconds per query-key pair)."""
        pairs = count * (self._attended(keys - 1, 1) - 1)
        return float(count), pairs / count + 1, seconds / pairs

    def _prefill_rate(self, length: int, start: int, seconds: float) -> tuple[float, float, float]:
        """(query tokens, keys at their end, seconds per query-key pair)."""
        pieces_pairs = sum(self._attended(0, chunk.length) for chunk in self.bench.pieces(length))
        return float(length), float(start + length), seconds / (self._attended(start, length) - pieces_pairs)

    def _attended(self, start: int, length: int) -> float:
        return attended(self.bench.spec.kv_groups, self.bench.spec.num_layers, start, length)


def process_bytes(llm: LLM, bench: StepBench) -> int:
    """Of the engine's process on a CPU, beside weights and a cache that is filled, after a step of one token."""
    if bench.device is not None or bench.seconds(rows(1, sample=True)) is None:
        return 0
    return max(0, resident_bytes() - llm.assembly.weight_bytes - llm.assembly.kv_bytes)


def host_curve(llm: LLM, counts: tuple[int, ...]) -> Curve:
    """The engine's own seconds per step by the number of sequences, each awaited by a caller of its own: between two
    steps, where planning and making text happen; where they hide behind the device, all that the CPU does from one
    step to the next but wait."""
    points = []
    for count in counts:
        if count > llm.assembly.engine.scheduler.config.max_num_seqs:
            continue
        full = [r for r in _decode_records(llm, count) if len(r["chunks"]) == count and r["tokens"] == count]
        if llm.assembly.device == "cuda":
            gaps = [b["finished"] - a["finished"] - b["parts"].get("wait", 0.0) for a, b in pairwise(full)]
        else:
            gaps = [b["started"] - a["finished"] for a, b in pairwise(full)]
        if gaps:
            points.append((float(count), max(0.0, statistics.median(gaps))))
    return Curve.of(points or [(1.0, 0.0)])


def _decode_records(llm: LLM, count: int) -> list[Record]:
    """Of so many short requests at once. On a CPU their callers share the processors with the engine: with an event
    loop that takes each token, a step's host part is up to twice that of a loop that only collects."""
    if llm.assembly.device != "cuda":
        requests = tuple(TraceRequest(HOST_PROMPT, HOST_OUTPUT) for _ in range(count))
        return run_open_loop(AsyncLLM.over(llm), Workload("host", "short requests at once", requests)).steps
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[(7 * i + j) % llm.spec.vocab_size for j in range(HOST_PROMPT)] for i in range(count)]
    with step_records(llm) as records:
        llm.generate(prompts, params, progress=False)
    return records
