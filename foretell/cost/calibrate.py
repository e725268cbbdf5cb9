"""Measure the engine's own steps on this machine and turn them into a profile.

Steps are run on the engine's worker as the engine would run them, with batches made to order: tokens without a past
for the linear layers, the same with sampling for the head, one token with a long past for decode attention, chunks
for prefill attention. What a component takes is the difference to the step without it.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING

import foretell
from foretell.core.params import SamplingParams
from foretell.cost.devices import DEVICES
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import Curve, Surface
from foretell.cost.heldout import with_held_out
from foretell.cost.profile import Profile, attended
from foretell.cost.stepping import PIECE, Shape, StepBench, decodes, pieces, rows
from foretell.cpus import usable_cpus
from foretell.errors import ConfigError

if TYPE_CHECKING:
    from foretell.llm import LLM

CPU_KV_BYTES = 3 << 30
Report = Callable[[int, int, str], None]  # points done, points in all, what is being measured
Pairs = tuple[tuple[int, int], ...]


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


CPU_GRID = Grid(
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048),
    rows=(1, 2, 4, 8, 16, 32, 64),
    decode=tuple((n, keys) for n in (1, 4, 16, 64) for keys in (64, 512, 2048, 8192)),
    prefill=tuple((length, start) for length in (32, 128, 512, 1024) for start in (0, 512, 2048, 6144)),
    host=(1, 8, 32),
    held_out=60,
)
DEVICE_GRID = Grid(
    tokens=(32, 64, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192),
    rows=(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256),
    decode=tuple((n, keys) for n in (1, 8, 32, 128, 256) for keys in (64, 512, 2048, 8192, 16384)),
    prefill=tuple((length, start) for length in (64, 256, 1024, 4096, 8192) for start in (0, 512, 4096)),
    host=(1, 8, 32, 128, 256),
    held_out=60,
)


def calibrate(llm: LLM, report: Report = lambda done, total, what: None, grid: Grid | None = None) -> Profile:
    """Some three minutes. Runs in the engine's own thread; the engine serves nobody meanwhile."""
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
    """The grid, component by component, in the engine's thread."""

    def __init__(self, bench: StepBench, grid: Grid, report: Callable[[int, str], None]) -> None:
        self.bench = bench
        self.grid = grid
        self._report = report
        self._done = 0

    def profile(self, llm: LLM) -> Profile:
        import torch

        bench = self.bench
        bench.fill_cache()
        head = self.head()
        own_linear = self.decode_linear(head) if bench.device is not None else None
        linear, decode, prefill = self.linear(head), self.decode(), self.prefill()
        if not (linear and head.x and decode and prefill):
            raise ConfigError("nothing could be measured: the KV cache is too small, raise kv_cache_bytes")
        graphs = getattr(bench.device, "graphs", None)
        return Profile(
            model=llm.assembly.files.name,
            spec=bench.spec,
            dtype=llm.assembly.dtype,
            weight_format=llm.assembly.weight_format,
            kernels=llm.assembly.kernels,
            hardware=machine_name(llm.assembly.device),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"foretell": foretell.__version__, "torch": torch.__version__.partition("+")[0]},
            block_size=bench.block_size,
            linear=Curve.of(linear),
            head=head,
            host=Curve.of([(1.0, 0.0)]),
            decode_rate=Surface.of(decode),
            prefill_rate=Surface.of(prefill),
            low=1.0,
            high=1.0,
            median_error=0.0,
            held_out=[],
            device=device_key(llm.assembly.device),
            overlaps=bench.device is not None,
            decode_linear=own_linear,
            graph_sizes=tuple(getattr(graphs, "sizes", ())),
            num_threads=0 if llm.assembly.device == "cuda" else llm.assembly.options.num_threads or usable_cpus(),
            eager_seconds=statistics.median(bench.launches) if graphs and bench.launches else 0.0,
        )

    def _each(self, what: str, points: tuple[int, ...]) -> Iterator[int]:
        for point in points:
            self._report(self._done, what)
            self._done += 1
            yield point

    def head(self) -> Curve:
        """The head and sampling by rows; alone on a device, where no step goes without."""
        points = []
        for count in self._each("head and sampling", self.grid.rows):
            if self.bench.device is not None:
                seconds = self.bench.head_seconds(count)
            else:
                seconds = self.bench.beyond(rows(count, sample=True), rows(count, sample=False))
            if seconds is not None:
                points.append((float(count), seconds))
        return Curve.of(points)

    def linear(self, head: Curve) -> list[tuple[float, float]]:
        """Everything that sees each token alone, by tokens."""
        points, most_rows = [], self.grid.rows[-1]
        for tokens in self._each("linear layers", self.grid.tokens):
            if tokens > self.bench.max_tokens:
                continue
            if self.bench.device is None:  # as the tokens of a decode step up to its usual size, then of prompts
                shape = rows(tokens, sample=False) if tokens <= most_rows else pieces(tokens)
                extra = 0.0
            else:
                shape = self.bench.pieces(tokens)
                extra = head(len(shape))
            if (seconds := self.bench.seconds(shape)) is not None:
                points.append((float(tokens), max(0.0, seconds - extra)))
        return points

    def decode_linear(self, head: Curve) -> Curve | None:
        """The same for decode steps on a device, at the sizes that graphs have."""
        found = {count: self.bench.seconds(rows(count, sample=True)) for count in self.grid.rows}
        points = [(float(n), max(0.0, seconds - head(n))) for n, seconds in found.items() if seconds is not None]
        return Curve.of(points) if points else None

    def decode(self) -> list[tuple[float, float, float]]:
        """(sequences, keys of each, seconds per query-key pair)."""
        points = []
        for count, keys in self._each_pair("decode attention", self.grid.decode):
            seconds = self.bench.beyond(decodes(count, keys), rows(count, sample=True))
            if seconds is not None:
                pairs = count * (self._attended(keys - 1, 1) - 1)
                points.append((float(count), pairs / count + 1, seconds / pairs))
        return points

    def prefill(self) -> list[tuple[float, float, float]]:
        """(query tokens, keys at their end, seconds per query-key pair)."""
        points = []
        for length, start in self._each_pair("prefill attention", self.grid.prefill):
            base: Shape = self.bench.pieces(length)
            if not PIECE < length <= self.bench.max_tokens or len(base) < 2:
                continue
            seconds = self.bench.beyond((ChunkShape(start, length, False),), base)
            if seconds is not None:
                pairs = self._attended(start, length) - sum(self._attended(0, c.length) for c in base)
                points.append((float(length), float(start + length), seconds / pairs))
        return points

    def _each_pair(self, what: str, points: Pairs) -> Iterator[tuple[int, int]]:
        for index in self._each(what, tuple(range(len(points)))):
            yield points[index]

    def _attended(self, start: int, length: int) -> float:
        return attended(self.bench.spec.kv_groups, self.bench.spec.num_layers, start, length)


def host_curve(llm: LLM, counts: tuple[int, ...]) -> Curve:
    """The engine's own seconds per step by the number of sequences: between two steps, where planning and making text
    happen; where they hide behind the device, all that the CPU does from one step to the next but wait."""
    from foretell.benchmark.steps import step_records

    points = []
    for count in counts:
        if count > llm.assembly.engine.scheduler.config.max_num_seqs:
            continue
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = [[(7 * i + j) % llm.spec.vocab_size for j in range(8)] for i in range(count)]
        with step_records(llm) as records:
            llm.generate(prompts, params, progress=False)
        full = [r for r in records if len(r["chunks"]) == count and r["tokens"] == count]
        if llm.assembly.device == "cuda":
            gaps = [b["finished"] - a["finished"] - b["parts"].get("wait", 0.0) for a, b in pairwise(full)]
        else:
            gaps = [b["started"] - a["finished"] for a, b in pairwise(full)]
        if gaps:
            points.append((float(count), max(0.0, statistics.median(gaps))))
    return Curve.of(points or [(1.0, 0.0)])


def kv_bytes_to_measure(device: str) -> int | None:
    """A cache no larger than the grid needs: it is filled with numbers. None leaves a GPU's as it is."""
    import torch

    from foretell.memory import default_kv_bytes

    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return None
    return min(CPU_KV_BYTES, default_kv_bytes())


def machine_name(device: str = "cpu") -> str:
    """The processor or device, as its maker calls it."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or 1} threads"


def device_key(device: str) -> str:
    """Which of ``DEVICES`` this is; "" for none of them."""
    if device != "cuda":
        return ""
    name = machine_name(device).lower()
    return next((key for key in sorted(DEVICES, key=len, reverse=True) if key in name.replace(" ", "")), "")
