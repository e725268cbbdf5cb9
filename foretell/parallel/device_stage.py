"""A rank's runner on a GPU: the same steps ahead of the CPU, with the other ranks' parts in between.

Every rank of the last stage finds the tokens from the same logits, so they need not travel between GPUs: equal cards
compute equal bits. The one that
``samples`` also tells the driver; what its CPU has chosen (log-probabilities, structured output) comes to the others
with the next step, as all tokens come to the stages before.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from foretell.config import SchedulerConfig
from foretell.core.messages import Batch, Chunk
from foretell.kernels.base import BatchContext, KVLayer
from foretell.model.residual import Residual, total
from foretell.model.transformer import Transformer
from foretell.parallel.device_comm import DeviceCommunicator
from foretell.parallel.layout import in_flight
from foretell.parallel.stage import OnDone
from foretell.worker.cuda_graphs import CudaGraphs
from foretell.worker.device_runner import DeviceRunner
from foretell.worker.device_step import Step
from foretell.worker.state import RequestState
from foretell.worker.step_buffers import StepLayout


class DeviceStage(DeviceRunner):
    """This rank's share of the layers between the hidden states that come and those that go on."""

    def __init__(
        self,
        model: Transformer,
        kv: list[KVLayer],
        config: SchedulerConfig,
        spare_blocks: tuple[int, ...],
        comm: DeviceCommunicator,
        vocab_size: int,
        *,
        graphs: CudaGraphs | None = None,
    ) -> None:
        depth, _ = in_flight(comm.layout.pp, "cuda")
        super().__init__(
            model, kv, config, spare_blocks, comm.device,
            graphs=graphs, vocab_size=vocab_size, in_flight=depth + 1,
        )  # fmt: skip
        self.comm = comm
        self.samples = comm.place.is_last and comm.shard == 0
        self._told: dict[int, list[int]] = {}
        self._last_finished = 0.0
        shape = (self.buffers.max_tokens, model.spec.hidden_size)
        self._coming = None if comm.place.is_first else self._hidden_states(shape)
        self._leaving = None if comm.place.is_last else self._hidden_states(shape)

    def _hidden_states(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, dtype=self.model.activation_dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        ways = [x for x in (self._coming, self._leaving) if x is not None]
        on_the_way = 0 if self._leaving is None else (self.in_flight - 1) * self._leaving.nbytes
        return super().nbytes + sum(x.nbytes for x in ways) + on_the_way

    def submit_step(self, batch: Batch, tokens: dict[int, list[int]]) -> Step:
        """``tokens``: by request, those sampled since it was last in a batch."""
        self._told = {} if self.samples else tokens
        step = self.submit(batch)
        if not self.samples:  # there, they are when the results are taken in
            for chunk, state in zip(batch.chunks, step.states, strict=True):
                state.prompt_logprobs_due = state.prompt_logprobs_due and not chunk.sample
        return step

    def _admit(self, batch: Batch) -> None:
        super()._admit(batch)
        for request_id, new in self._told.items():
            for token in new:
                self.states[request_id].append(token)

    def _forward(self, chunks: list[Chunk], states: list[RequestState], ring: int) -> Tensor:
        tokens = sum([chunk.length for chunk in chunks])
        if self._coming is not None:
            self.comm.receive_into(self._coming[:tokens])
        logits = super()._forward(chunks, states, ring)
        if self._leaving is not None:
            self.comm.send_on(self._leaving[:tokens].clone())  # the next step may write there before these are gone
        return logits

    def _through(self, num_tokens: int, context: BatchContext, last_rows: Tensor | None) -> Tensor:
        coming = self._coming
        x: Residual
        x = self.model.embed(self.buffers.token_ids[:num_tokens], context) if coming is None else coming[:num_tokens]
        x = self.model.run_blocks(x, context, self.kv, last_rows)
        if self._leaving is None:
            return self.model.finish(x)
        return self._leaving[:num_tokens].copy_(total(x))

    def _greedy(self, layout: StepLayout, hidden: Tensor) -> Tensor:
        if self._leaving is not None:
            return self.buffers.logits[: len(hidden)]
        return super()._greedy(layout, hidden)

    def _sample(self, batch: Batch, states: list[RequestState], logits: Tensor, ring: int) -> Step:
        if self._leaving is not None:
            return Step(batch, states, self.buffers.sampled_host[ring][: len(batch.chunks)])
        return super()._sample(batch, states, logits, ring)

    def _prompt_logprobs(self, chunks: list[Chunk], states: list[RequestState], hidden: Tensor) -> None:
        if self._leaving is None:
            super()._prompt_logprobs(chunks, states, hidden)

    # -- the rank's loop ----------------------------------------------------------------------------

    ahead = True  # what ``begin`` gives returns before the step is done

    def begin(
        self, done: OnDone, failed: Callable[[Exception], None]
    ) -> Callable[[Batch, dict[int, list[int]]], None]:
        """What submits a batch; where the results are, a thread of its own waits for them and ``done`` hears."""
        steps: queue.SimpleQueue[tuple[Step, float]] = queue.SimpleQueue()

        def execute(batch: Batch, tokens: dict[int, list[int]]) -> None:
            started = time.monotonic()
            step = self.submit_step(batch, tokens)
            if self.samples:
                steps.put((step, started))

        def collect() -> None:
            try:
                torch.cuda.set_device(self.device)
                while True:
                    self._collect(*steps.get(), done)
            except Exception as error:  # whatever it is, this rank can go no further
                failed(error)

        if self.samples:
            threading.Thread(target=collect, name="foretell-collect", daemon=True).start()
        return execute

    def _collect(self, step: Step, started: float, done: OnDone) -> None:
        waited = time.monotonic()
        results = self.collect(step)
        parts = {"launch": step.launched_seconds, "wait": time.monotonic() - waited}
        done(step.batch.id, results, max(started, self._last_finished), parts)
        self._last_finished = time.monotonic()
