"""Steps made to order on the engine's own worker, timed: what calibration measures with.

On the CPU a step is timed by the clock, and again while its threads had to wait for a processor (``cost.quiet``); of
an engine of one thread by that thread's CPU time, which others on the machine do not lengthen. On a device it is
timed by the device's own events, behind a pause that lets the CPU launch ahead: so what is timed is the device's
work, and launching is timed apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from foretell.core.messages import Added, Batch, Chunk
from foretell.core.params import SamplingParams
from foretell.cost.floor import ChunkShape
from foretell.cost.quiet import Sample, undisturbed, waited_seconds
from foretell.errors import ConfigError
from foretell.executor.local import LocalExecutor
from foretell.executor.overlapped import OverlappedExecutor

if TYPE_CHECKING:
    import torch

    from foretell.llm import LLM
    from foretell.worker.device_runner import DeviceRunner
    from foretell.worker.runner import ModelRunner

PIECE = 16  # tokens of each sequence where attention shall not count
MOST_PIECES = 32  # on a device, which has a head for each of them
REFERENCE = (4, 256)  # sequences, keys of each: the decode step that tells how fast the machine is at the moment
FIRST_ID = 1 << 40  # no request of the engine has such an id
POINT_SECONDS, FEWEST, MOST = 0.1, 3, 60  # spent on one point at a time, and between how many runs
PATIENCE = 3.0  # times as long is spent on a point that others on the machine disturb
SLOW_SECONDS = 0.5  # a point that one run takes longer for is not run again, unless it was disturbed
LONGEST_SECONDS = 3.0  # a point that one run takes longer for is left out
EAGER_SECONDS, GRAPH_SECONDS = 0.02, 0.002  # to launch a step of kernels, before the first is timed; of a graph
CYCLES_PER_SECOND = 1.8e9  # of a device's clock, roughly: the pause need not be exact

Shape = tuple[ChunkShape, ...]


def pieces(tokens: int, piece: int = PIECE) -> Shape:
    """So many tokens with next to no past, in as few sequences as that allows."""
    whole, rest = divmod(tokens, piece)
    return tuple(ChunkShape(0, length, False) for length in [piece] * whole + ([rest] if rest else []))


def rows(count: int, *, sample: bool) -> Shape:
    return tuple(ChunkShape(0, 1, sample) for _ in range(count))


def decodes(count: int, keys: int) -> Shape:
    """So many sequences that get one token each, which sees so many keys."""
    return tuple(ChunkShape(keys - 1, 1) for _ in range(count))


class StepBench:
    """Runs steps of given shapes on a worker, whose cache it fills with numbers first."""

    def __init__(self, llm: LLM) -> None:
        executor = llm.assembly.engine.executor
        if not isinstance(executor, (LocalExecutor, OverlappedExecutor)):
            raise ConfigError("calibrate measures an engine of one process: leave tp and pp at 1")
        if llm.assembly.engine.has_work or llm.assembly.engine.scheduler.blocks.caching:
            raise ConfigError("calibrate overwrites the KV cache: it wants an idle engine without a prefix cache")
        config = llm.assembly.engine.scheduler.config
        self.device = executor.runner if isinstance(executor, OverlappedExecutor) else None
        self.runner: ModelRunner | DeviceRunner = executor.runner
        self.num_blocks = executor.num_blocks
        self.block_size = llm.assembly.options.block_size
        self.spec = llm.spec
        self.max_len = llm.assembly.max_model_len
        self.max_tokens, self.max_seqs = config.max_num_batched_tokens, config.max_num_seqs
        # one thread's own CPU time is what the step takes of an idle machine, whoever else runs on this one
        alone = self.device is None and llm.assembly.options.num_threads == 1
        self._clock = time.thread_time if alone else time.perf_counter
        self._by_clock = self.device is None and not alone
        self.launches: list[float] = []  # CPU seconds that launching each eager step took, on a device
        self._next_id = FIRST_ID

    def fits(self, shape: Shape) -> bool:
        windows = [group.window for group in self.spec.kv_groups]
        enough = all(
            sum(len(held) for _, held in (self._held(chunk, window) for chunk in shape)) <= blocks
            for window, blocks in zip(windows, self.num_blocks, strict=True)
        )
        small = sum(c.length for c in shape) <= self.max_tokens and len(shape) <= self.max_seqs
        return enough and (small or self.device is None) and all(c.start + c.length <= self.max_len for c in shape)

    def pieces(self, tokens: int) -> Shape:
        return pieces(tokens) if self.device is None else pieces(tokens, max(PIECE, -(-tokens // MOST_PIECES)))

    def _held(self, chunk: ChunkShape, window: int | None) -> tuple[int, range]:
        """(blocks that have fallen out of the window, logical blocks that are held)."""
        first = 0 if window is None else max(0, chunk.start - window + 1) // self.block_size
        return first, range(first, -(-(chunk.start + chunk.length) // self.block_size))

    def fill_cache(self) -> None:
        """Pages that were never written are all one page of zeros, and far too quick to read."""
        import torch

        with torch.inference_mode():
            for layer in self.runner.kv:
                layer.k.uniform_(-1, 1)
                layer.v.uniform_(-1, 1)
        if self.device is not None and self.device.stream is not None:
            torch.cuda.synchronize(self.device.device)

    def seconds(self, shape: Shape) -> float | None:
        """Median of a step of this shape; None if it does not fit or takes too long."""
        found = self.side_by_side(shape)
        return None if found is None else found[0]

    def reference_seconds(self) -> float:
        """Of a small decode step that is always the same: how fast the machine is at the moment. 0 on a device, whose
        clock is its own, and where its keys do not fit."""
        return 0.0 if self.device is not None else self.seconds(decodes(*REFERENCE)) or 0.0

    def with_launching(self, shape: Shape) -> tuple[float, float] | None:
        """``seconds`` of the step, and with its launching, should that take longer than the device's work."""
        before, seconds = len(self.launches), self.seconds(shape)
        launches = self.launches[before:]
        if seconds is None or not launches:
            return None if seconds is None else (seconds, seconds)
        return seconds, max(seconds, statistics.median(launches))

    def beyond(self, shape: Shape, base: Shape) -> float | None:
        """What a step takes more than another, the two measured in turn: whatever slows the machine meets both."""
        found = self.side_by_side(shape, base)
        return None if found is None else max(0.0, found[0] - found[1])

    def side_by_side(self, *shapes: Shape) -> list[float] | None:
        """Medians of steps of these shapes, run in turn (A B A B …)."""
        if not all(self.fits(shape) for shape in shapes):
            return None
        if self.device is not None and sum(map(len, shapes)) > self.max_seqs:
            return self._one_by_one(shapes)
        with self._requests(shapes) as (firsts, again):
            launched = len(self.launches)
            warm = self._sample(firsts)
            if self.device is not None:  # the first time, kernels of this shape may have been compiled
                del self.launches[launched:]
                warm = self._sample(again)
            if max(warm.seconds) > LONGEST_SECONDS:
                return None
            slow = max(warm.seconds) > SLOW_SECONDS
            samples, fewest = [warm] if slow else [], 1 if slow else FEWEST
            begun = time.perf_counter()
            while not self._enough(samples, fewest, time.perf_counter() - begun):
                samples.append(self._sample(again))
            kept = undisturbed(samples, fewest)
            return [statistics.median(own) for own in zip(*(sample.seconds for sample in kept), strict=True)]

    def _enough(self, samples: list[Sample], fewest: int, spent: float) -> bool:
        quiet = sum(sample.quiet for sample in samples)
        if fewest == 1:
            return quiet > 0 or len(samples) >= 2
        late = spent >= PATIENCE * POINT_SECONDS or len(samples) >= MOST
        return len(samples) >= fewest and (late or (spent >= POINT_SECONDS and quiet >= fewest))

    def _sample(self, batches: list[Batch]) -> Sample:
        """One run of each, in turn, and how much they were disturbed."""
        seconds, waited = [], 0.0
        for batch in batches:
            before = waited_seconds() if self._by_clock else 0.0
            seconds.append(self._timed(batch))
            if self._by_clock:
                waited = max(waited, (waited_seconds() - before) / seconds[-1])
        return Sample(tuple(seconds), waited)

    def _one_by_one(self, shapes: tuple[Shape, ...]) -> list[float] | None:
        """For want of slots: one after the other, which a device's steady times allow."""
        found = [self.seconds(shape) for shape in shapes]
        return None if None in found else [seconds for seconds in found if seconds is not None]

    @contextmanager
    def _requests(self, shapes: tuple[Shape, ...]) -> Iterator[tuple[list[Batch], list[Batch]]]:
        batches = [self._batches(shape) for shape in shapes]
        try:
            yield [first for first, _ in batches], [again for _, again in batches]
        finally:
            own = [i for i in self.runner.states if i >= FIRST_ID]
            for request_id in own:
                del self.runner.states[request_id]
                if self.device is not None:
                    self.device.free_slots.append(self.device.slots.pop(request_id))

    def _timed(self, batch: Batch) -> float:
        if self.device is None or self.device.stream is None:
            started = self._clock()
            self._run(batch)
            return self._clock() - started
        return self._timed_on_device(self.device, self.device.stream, batch)

    def _run(self, batch: Batch) -> None:
        if self.device is None:
            self.runner.execute(batch)  # type: ignore[union-attr]  # no device: the runner of the CPU
            return
        step = self.device.submit(batch)
        if any(chunk.length > 1 for chunk in batch.chunks):
            self.launches.append(step.launched_seconds)
        self.device.collect(step)

    def _timed_on_device(self, runner: DeviceRunner, stream: torch.cuda.Stream, batch: Batch) -> float:
        import torch

        eager = any(chunk.length > 1 for chunk in batch.chunks) or runner.graphs is None
        launch = (self.launches[-1] if self.launches else EAGER_SECONDS) if eager else GRAPH_SECONDS
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(stream)  # as the runner does, once and for good: this is the engine's thread
        torch.cuda._sleep(int(1.5 * launch * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        begin.record(stream)
        step = runner.submit(batch)
        end.record(stream)
        if eager:
            self.launches.append(step.launched_seconds)
        runner.collect(step)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def head_seconds(self, count: int) -> float | None:
        """Of the head alone for so many rows, where a step cannot be had without it: on a device."""
        import torch

        runner = self.device
        if runner is None or count > self.max_seqs:
            return None
        with torch.inference_mode():
            hidden = torch.zeros(
                count, self.spec.hidden_size, dtype=runner.kv[0].k.dtype, device=runner.device
            ).uniform_(-1, 1)
            times = [self._timed_head(runner, hidden) for _ in range(2 + 2 * FEWEST)]
        return statistics.median(times[2:])

    def _timed_head(self, runner: DeviceRunner, hidden: torch.Tensor) -> float:
        import torch

        out = runner.buffers.logits[: len(hidden)]
        if runner.stream is None:
            started = time.perf_counter()
            runner.model.logits(hidden, out)
            return time.perf_counter() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(runner.stream)
        torch.cuda._sleep(int(1e-3 * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        begin.record(runner.stream)
        runner.model.logits(hidden, out)
        end.record(runner.stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

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
