"""A rank's runner: its stage's layers between receiving hidden states and sending them on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foretell.core.messages import Batch, ChunkResult
from foretell.kernels.base import KVLayer
from foretell.model.residual import Residual, total
from foretell.worker.runner import ModelRunner
from foretell.worker.sampler import Sampler
from foretell.worker.state import RequestState

if TYPE_CHECKING:
    from foretell.model.transformer import Transformer
    from foretell.parallel.comm import Communicator


OnDone = Callable[[int, list[ChunkResult], float, dict[str, float]], None]  # batch id, results, started, parts


class SilentSampler(Sampler):
    """Of the ranks that share the last stage one samples; the others only take part in gathering the logits."""

    def __call__(self, logits: Tensor, states: list[RequestState]) -> list[ChunkResult]:
        return [ChunkResult(state.id) for state in states]


class StageRunner(ModelRunner):
    """The same bookkeeping on every rank; the work between is the stage's."""

    def __init__(
        self,
        model: Transformer,
        kv: list[KVLayer],
        block_size: int,
        comm: Communicator,
        vocab_size: int,
        *,
        torch_threads: int | None = None,
    ) -> None:
        super().__init__(model, kv, block_size, torch_threads=torch_threads)
        self.comm = comm
        self.samples = comm.place.is_last and comm.shard == 0
        self.sampler = Sampler(vocab_size) if self.samples else SilentSampler(vocab_size)

    ahead = False  # a step is done when ``begin``'s result returns

    def begin(
        self, done: OnDone, failed: Callable[[Exception], None]
    ) -> Callable[[Batch, dict[int, list[int]]], None]:
        """What computes a batch; ``done`` hears of it where the results are."""

        def execute(batch: Batch, tokens: dict[int, list[int]]) -> None:
            started = time.monotonic()
            results = self.execute_step(batch, tokens)
            if self.samples:
                done(batch.id, results, started, self.parts)

        return execute

    @torch.inference_mode()
    def execute_step(self, batch: Batch, tokens: dict[int, list[int]]) -> list[ChunkResult]:
        """This rank's part of a batch; results on the rank that samples, else nothing of use."""
        started = time.perf_counter()
        self._take_in(batch)
        if not self.samples:
            for request_id, new in tokens.items():
                for token in new:
                    self.states[request_id].append(token)
        token_ids, context = self._inputs(batch.chunks)
        prepared = time.perf_counter()
        place, model = self.comm.place, self.model
        x: Residual
        if place.is_first:
            x = model.embed(token_ids, context)
        else:
            x = self.comm.receive((len(token_ids), model.spec.hidden_size), torch.float32)
        received = time.perf_counter()
        x = model.run_blocks(x, context, self.kv)
        if not place.is_last:
            self.comm.send_on(total(x))
            return []
        hidden = model.finish(x)
        forwarded = time.perf_counter()
        results = self._results(batch.chunks, hidden)
        self.parts = {
            "prepare": prepared - started,
            "receive": received - prepared,
            "forward": forwarded - received,
            "sample": time.perf_counter() - forwarded,
        }
        return results
