"""Measure the engine's own steps on this machine and turn them into a profile.

Steps are run on the engine's worker as the engine would run them, with batches made to order: tokens without a past
for the linear layers, the same with sampling for the head, one token with a long past for decode attention, chunks
for prefill attention. What a component takes is the difference to the step without it.
"""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from foretell.core.messages import Added, Batch, Chunk
from foretell.core.params import SamplingParams
from foretell.cost.floor import ChunkShape
from foretell.cost.grid import Curve, Surface
from foretell.cost.profile import Profile, attended
from foretell.cost.step import StepCost
from foretell.errors import ConfigError
from foretell.executor.local import LocalExecutor
from foretell.trace.metrics import percentile

if TYPE_CHECKING:
    from foretell.llm import LLM
    from foretell.worker.runner import ModelRunner

PIECE = 16  # tokens of each sequence where attention shall not count
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64)
DECODE = tuple((n, keys) for n in (1, 4, 16, 64) for keys in (64, 512, 2048, 8192))
PREFILL = tuple((length, start) for length in (32, 128, 512, 2048) for start in (0, 512, 2048, 8192))
HELD_OUT = 24
FIRST_ID = 1 << 40  # no request of the engine has such an id
POINT_SECONDS, FEWEST, MOST = 0.25, 3, 60  # spent on one point, and between how many runs
LONGEST_SECONDS = 4.0  # a point that one run takes longer for is left out

Report = Callable[[int, int, str], None]  # points done, points in all, what is being measured
Shape = tuple[ChunkShape, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of step: its median, and the step it was."""

    shape: Shape
    seconds: float


class Bench:
    """Runs steps of given shapes on a worker, whose cache it fills with numbers first."""

    def __init__(self, llm: LLM) -> None:
        executor = llm.assembly.engine.executor
        if not isinstance(executor, LocalExecutor):
            raise ConfigError("calibrate measures an engine of one process on the CPU so far")
        if llm.assembly.engine.has_work or llm.assembly.engine.scheduler.blocks.caching:
            raise ConfigError("calibrate overwrites the KV cache: it wants an idle engine without a prefix cache")
        self.runner: ModelRunner = executor.runner
        self.num_blocks = executor.num_blocks
        self.block_size = llm.assembly.options.block_size
        self.spec = llm.spec
        self.max_len = llm.assembly.max_model_len
        self._next_id = FIRST_ID

    def fits(self, shape: Shape) -> bool:
        windows = [group.window for group in self.spec.kv_groups]
        enough = all(
            sum(len(held) for _, held in (self._held(chunk, window) for chunk in shape)) <= blocks
            for window, blocks in zip(windows, self.num_blocks, strict=True)
        )
        return enough and all(c.start + c.length <= self.max_len for c in shape)

    def _held(self, chunk: ChunkShape, window: int | None) -> tuple[int, range]:
        """(blocks that have fallen out of the window, logical blocks that are held)."""
        first = 0 if window is None else max(0, chunk.start - window + 1) // self.block_size
        return first, range(first, -(-(chunk.start + chunk.length) // self.block_size))

    def fill_cache(self) -> None:
        """Pages that were never written are all one page of zeros, and far too quick to read."""
        for layer in self.runner.kv:
            layer.k.uniform_(-1, 1)
            layer.v.uniform_(-1, 1)

    def seconds(self, shape: Shape) -> float | None:
        """Median of a step of this shape; None if it does not fit or takes too long."""
        found = self.side_by_side(shape)
        return None if found is None else found[0]

    def beyond(self, shape: Shape, base: Shape) -> float | None:
        """What a step takes more than another, the two measured in turn: whatever slows the machine meets both."""
        found = self.side_by_side(shape, base)
        return None if found is None else max(0.0, found[0] - found[1])

    def side_by_side(self, *shapes: Shape) -> list[float] | None:
        """Medians of steps of these shapes, run in turn (A B A B …)."""
        if not all(self.fits(shape) for shape in shapes):
            return None
        again = []
        try:
            for shape in shapes:
                first, batch = self._batches(shape)
                again.append((batch, shape))
                if self._timed(first) > LONGEST_SECONDS:
                    return None
            times: list[list[float]] = [[] for _ in shapes]
            while len(times[0]) < FEWEST or (sum(map(sum, times)) < POINT_SECONDS and len(times[0]) < MOST):
                for own, (batch, _) in zip(times, again, strict=True):
                    own.append(self._timed(batch))
            return [statistics.median(own) for own in times]
        finally:
            self.runner.states = {i: state for i, state in self.runner.states.items() if i < FIRST_ID}

    def _timed(self, batch: Batch) -> float:
        started = time.perf_counter()
        self.runner.execute(batch)
        return time.perf_counter() - started

    def _batches(self, shape: Shape) -> tuple[Batch, Batch]:
        """The same step twice: once with all blocks, once as a step among others."""
        added, first, again = [], [], []
        taken = [0] * len(self.num_blocks)
        for index, chunk in enumerate(shape):
            end = chunk.start + chunk.length
            tables = []
            for number, group in enumerate(self.spec.kv_groups):
                dropped, held = self._held(chunk, group.window)
                begin = taken[number]
                taken[number] += len(held)
                tables.append((*[-1] * dropped, *range(begin, taken[number])))
            request_id, blocks = self._next_id + index, tuple(tables)
            tokens = [(17 * i + index) % self.spec.vocab_size for i in range(end)]
            added.append(Added(request_id, SamplingParams(temperature=0, ignore_eos=True), tokens, []))
            first.append(Chunk(request_id, chunk.start, chunk.length, blocks, chunk.sample))
            again.append(replace(first[-1], new_block_ids=((),) * len(self.num_blocks)))
        self._next_id += len(shape)
        return Batch(-1, first, added), Batch(-1, again)


def pieces(tokens: int, *, sample: bool = False) -> Shape:
    """So many tokens with next to no past, in as few sequences as that allows."""
    whole, rest = divmod(tokens, PIECE)
    lengths = [PIECE] * whole + ([rest] if rest else [])
    return tuple(ChunkShape(0, length, sample) for length in lengths)


def rows(count: int, *, sample: bool) -> Shape:
    return tuple(ChunkShape(0, 1, sample) for _ in range(count))


def calibrate(llm: LLM, report: Report = lambda done, total, what: None) -> Profile:
    """About two minutes. Runs in the engine's own thread; the engine serves nobody meanwhile."""
    result: list[Profile] = []
    llm.service.call(lambda engine: result.append(_measure(llm, Bench(llm), report))).result()
    host = host_curve(llm)
    return _with_held_out(llm, replace(result[0], host=host), report)


def _measure(llm: LLM, bench: Bench, report: Report) -> Profile:
    bench.fill_cache()
    points = len(TOKENS) + len(ROWS) + len(DECODE) + len(PREFILL)
    done = 0

    def report_next(what: str) -> None:
        nonlocal done
        report(done, points + HELD_OUT, what)
        done += 1

    groups, layers = bench.spec.kv_groups, bench.spec.num_layers
    config = llm.assembly.engine.scheduler.config
    limit = config.max_num_batched_tokens
    linear_points, head_points, decode_points, prefill_points = [], [], [], []
    for tokens in TOKENS:
        report_next("linear layers")
        if tokens <= limit and (seconds := bench.seconds(_plain(tokens))) is not None:
            linear_points.append((float(tokens), seconds))
    for count in ROWS:
        report_next("head and sampling")
        seconds = bench.beyond(rows(count, sample=True), rows(count, sample=False))
        if seconds is not None:
            head_points.append((float(count), seconds))
    for count, keys in DECODE:
        report_next("decode attention")
        seconds = bench.beyond(_decode(count, keys), rows(count, sample=True))
        if seconds is not None:
            pairs = count * (attended(groups, layers, keys - 1, 1) - 1)
            decode_points.append((float(count), pairs / count + 1, seconds / pairs))
    for length, start in PREFILL:
        report_next("prefill attention")
        base = pieces(length)
        seconds = bench.beyond((ChunkShape(start, length, False),), base) if PIECE < length <= limit else None
        if seconds is not None:
            pairs = attended(groups, layers, start, length) - sum(attended(groups, layers, 0, c.length) for c in base)
            prefill_points.append((float(length), float(start + length), seconds / pairs))
    if not (linear_points and head_points and decode_points and prefill_points):
        raise ConfigError("nothing could be measured: the KV cache is too small, raise kv_cache_bytes")
    return Profile(
        model=llm.assembly.files.name,
        spec=bench.spec,
        dtype=llm.assembly.dtype,
        weight_format=llm.assembly.weight_format,
        kernels=llm.assembly.kernels,
        hardware=machine_name(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("foretell", "torch")},
        block_size=bench.block_size,
        linear=Curve.of(linear_points),
        head=Curve.of(head_points),
        host=Curve.of([(1.0, 0.0)]),
        decode_rate=Surface.of(decode_points),
        prefill_rate=Surface.of(prefill_points),
        low=1.0,
        high=1.0,
        median_error=0.0,
        held_out=[],
    )


def _decode(count: int, keys: int) -> Shape:
    """So many sequences that get one token each, which sees so many keys."""
    return tuple(ChunkShape(keys - 1, 1) for _ in range(count))


def _plain(tokens: int) -> Shape:
    """As the tokens of a decode step up to its usual size, then as pieces of prompts."""
    return rows(tokens, sample=False) if tokens <= ROWS[-1] else pieces(tokens)


def host_curve(llm: LLM) -> Curve:
    """Seconds between two steps, in which the engine plans and texts are made, by the number of sequences."""
    from foretell.benchmark.steps import step_records

    points = []
    for count in (1, 8, 32):
        if count > llm.assembly.engine.scheduler.config.max_num_seqs:
            continue
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = [[(7 * i + j) % llm.spec.vocab_size for j in range(8)] for i in range(count)]
        with step_records(llm) as records:
            llm.generate(prompts, params, progress=False)
        full = [r for r in records if len(r["chunks"]) == count]
        gaps = [b["started"] - a["finished"] for a, b in pairwise(full)]
        if gaps:
            points.append((float(count), statistics.median(gaps)))
    return Curve.of(points or [(1.0, 0.0)])


def _with_held_out(llm: LLM, profile: Profile, report: Report) -> Profile:
    """Random mixed steps that no point was made for: how far the prediction is from them is the interval."""
    bench, cost = Bench(llm), StepCost(replace(profile, host=Curve.of([(1.0, 0.0)])))
    found: list[dict[str, Any]] = []
    total = len(TOKENS) + len(ROWS) + len(DECODE) + len(PREFILL) + HELD_OUT

    def run(engine: object) -> None:
        for number, shape in enumerate(random_shapes(llm, HELD_OUT)):
            report(total - HELD_OUT + number, total, "steps held out")
            seconds = bench.seconds(shape)
            if seconds is not None:
                predicted = cost.estimate(shape).seconds
                found.append({"tokens": sum(c.length for c in shape), "sequences": len(shape),
                              "predicted": predicted, "measured": seconds})  # fmt: skip

    llm.service.call(run).result()
    ratios = sorted(item["measured"] / item["predicted"] for item in found)
    if not ratios:
        return profile
    return replace(
        profile,
        low=min(1.0, percentile(ratios, 5)),
        high=max(1.0, percentile(ratios, 95)),
        median_error=statistics.median(abs(1 - 1 / ratio) for ratio in ratios),
        held_out=found,
    )


def random_shapes(llm: LLM, count: int, seed: int = 1) -> Iterator[Shape]:
    """Decodes of random pasts, prompt chunks, and both together, as an engine meets them."""
    rng = random.Random(seed)
    config, longest = llm.assembly.engine.scheduler.config, min(llm.assembly.max_model_len - 1, 4096)
    most = min(config.max_num_seqs, ROWS[-1])
    for number in range(count):
        decodes = rng.randrange(1, most + 1) if number % 3 != 1 else 0
        reach = rng.randrange(32, longest)
        shape = [ChunkShape(rng.randrange(1, reach), 1) for _ in range(decodes)]
        if number % 3:
            length = rng.randrange(8, min(1024, config.max_num_batched_tokens, longest) - decodes)
            shape.append(ChunkShape(rng.choice((0, rng.randrange(longest - length + 1))), length, rng.random() < 0.5))
        yield tuple(shape)


def machine_name() -> str:
    """The processor, as its maker calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(names) or 1} threads"
