"""The GPU ranks' runner, on CPU tensors in threads of one process: the plain runner's tokens, whatever the layout."""

from __future__ import annotations

import queue
import random
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.messages import Batch, Result
from foretell.core.params import SamplingParams
from foretell.executor.replay import ReplayExecutor, replay
from foretell.model.build import Builder
from foretell.model.load import spec_for
from foretell.model.weights import FileWeights
from foretell.parallel.device_stage import DeviceStage
from foretell.parallel.layout import Layout, in_flight, make_layout, shard_spec
from foretell.parallel.shard import ShardedWeights
from foretell.parallel.wrap import wrap
from foretell.store import open_tensors, resolve
from foretell.worker.device_step import Step
from foretell.worker.kv import allocate
from tests.model import models
from tests.model.test_device_runner import PaddedSteps
from tests.model.test_whatever_happens_around import PROMPT_COUNT, expected, run
from tests.parallel.test_wrap import Deferring, ThreadGroup, Threads
from tests.unit.test_scheduler_invariants import trace_of

NUM_BLOCKS = 30
CONFIG = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=24, max_model_len=128)


class ThreadComm(ThreadGroup):
    """A rank's way to the others: its group's threads, and a queue from stage to stage."""

    device = torch.device("cpu")

    def __init__(
        self, layout: Layout, rank: int, groups: list[Threads], ways: dict[int, queue.Queue[Tensor]]
    ) -> None:
        self.layout, self.place, self.ways = layout, layout.place(rank), ways
        super().__init__(groups[self.place.stage], self.place.shard, lazy=True)

    def send_on(self, x: Tensor) -> None:
        self.ways[self.place.rank].put(x)

    def receive_into(self, x: Tensor) -> None:
        x.copy_(self.ways[self.place.rank - self.layout.tp].get(timeout=60))


class ThreadRanks:
    """What ParallelExecutor and its processes do, with ranks that are threads."""

    def __init__(self, tp: int, pp: int) -> None:
        files = resolve(str(models.prepare("glassllm")))
        spec = spec_for(files)
        layout = make_layout(spec, tp, pp)
        self.depth, self.chain = in_flight(pp, "cuda")
        self.num_blocks = (NUM_BLOCKS,)
        groups = [Threads(tp) for _ in range(pp)]
        ways: dict[int, queue.Queue[Tensor]] = {rank: queue.Queue() for rank in range(layout.num_ranks)}
        self.runners = []
        for rank in range(layout.num_ranks):
            comm: Any = ThreadComm(layout, rank, groups, ways)
            own, place = shard_spec(spec, tp), layout.place(rank)
            whole = FileWeights(open_tensors(files), spec)
            weights = ShardedWeights(whole, spec, tp, place.shard) if tp > 1 else whole
            model = Builder(own, weights, Deferring(), torch.float32, layers=place.layers).build()
            kv = allocate(own, (NUM_BLOCKS + 1,), CONFIG.block_size, torch.float32, place.layers)
            for layer in kv:
                layer.k.fill_(float("nan"))
                layer.v.fill_(float("nan"))
            graphs: Any = PaddedSteps(CONFIG.max_num_seqs)
            model = wrap(model, comm, spec.vocab_size)
            self.runners.append(DeviceStage(model, kv, CONFIG, self.num_blocks, comm, spec.vocab_size, graphs=graphs))
        self.sampling = next(runner for runner in self.runners if runner.samples)
        self.pool = ThreadPoolExecutor(layout.num_ranks)
        self.batches: list[Batch] = []
        self._steps: deque[tuple[Batch, Step]] = deque()
        self._tokens: dict[int, list[int]] = {}
        self.now = 0.0

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        return None

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)
        for request_id in batch.removed:
            self._tokens.pop(request_id, None)
        self._tokens.update((added.request_id, []) for added in batch.added)
        tokens = {c.request_id: new for c in batch.chunks if (new := self._tokens[c.request_id])}
        self._tokens.update((request_id, []) for request_id in tokens)
        steps = list(self.pool.map(lambda runner: runner.submit_step(batch, tokens), self.runners))
        self._steps.append((batch, steps[self.runners.index(self.sampling)]))

    def wait(self, until: float | None) -> Result | None:
        batch, step = self._steps.popleft()
        results = self.sampling.collect(step)
        for result in results:
            if result.token_id is not None and result.request_id in self._tokens:
                self._tokens[result.request_id].append(result.token_id)
        self.now += 1.0
        return Result(batch.id, results, self.now - 1.0, self.now)

    def wake(self) -> None: ...

    def close(self) -> None:
        self.pool.shutdown()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2)])
def test_same_tokens_as_the_plain_runner_and_the_twin_agrees(tp: int, pp: int) -> None:
    executor, events = ThreadRanks(tp, pp), []  # type: ignore[var-annotated]
    try:
        engine = Engine(CONFIG, executor, on_event=events.append)
        rng = random.Random(tp + 10 * pp)
        arrivals: dict[int, list[int]] = {}
        for i in range(PROMPT_COUNT):
            arrivals.setdefault(rng.randrange(0, 12), []).append(i)
        outputs = run(engine, arrivals, preempt=0.2, seed=3)
        assert outputs == {i: expected()[i] for i in range(PROMPT_COUNT)}
        assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
        twin = ReplayExecutor(executor.num_blocks, depth=executor.depth, chain=executor.chain)
        replay(events, Engine(CONFIG, twin))
        assert trace_of(twin.submitted) == trace_of(executor.batches)
        for runner in executor.runners:  # all have let go of the same
            assert runner.states.keys() == executor.sampling.states.keys()
    finally:
        executor.close()
