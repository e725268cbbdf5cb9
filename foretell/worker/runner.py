"""One rank's work on a batch: lay the tokens end to end, run the model, sample."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from foretell.core.messages import Batch, Chunk, ChunkResult
from foretell.kernels.base import BatchContext, KVGroupView, KVLayer
from foretell.worker.pooling import embedding_of, pool_chunk
from foretell.worker.prompt_logprobs import gather_prompt_logprobs
from foretell.worker.sampler import Sampler
from foretell.worker.state import RequestState

if TYPE_CHECKING:
    from foretell.grammar.compiler import GrammarCompiler
    from foretell.model.transformer import Transformer


class ModelRunner:
    """Turns batches into sampled tokens with a model, its KV cache and the requests it has been told of."""

    def __init__(
        self, model: Transformer, kv: list[KVLayer], block_size: int, *, torch_threads: int | None = None
    ) -> None:
        """``torch_threads``: for the thread that computes; kernels with a pool of their own want torch's idle."""
        self.model = model
        self.kv = kv
        self.block_size = block_size
        self.num_groups = len(model.spec.kv_groups)
        self.states: dict[int, RequestState] = {}
        self.grammars: GrammarCompiler | None = None  # set by who knows the tokenizer
        self.sampler = Sampler(model.spec.vocab_size)
        self._torch_threads = torch_threads
        self.parts: dict[str, float] = {}  # seconds of the last batch by component

    def release(self) -> None:
        """Let go of weights and KV cache; nothing can be executed any more."""
        self.kv.clear()
        self.states.clear()
        del self.model

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[ChunkResult]:
        """Compute the batch; results for chunks that sample, pool or failed."""
        started = time.perf_counter()
        self._take_in(batch)
        token_ids, context = self._inputs(batch.chunks)
        prepared = time.perf_counter()
        hidden = self.model.forward(token_ids, context, self.kv)
        forwarded = time.perf_counter()
        results = self._results(batch.chunks, hidden)
        self.parts = {
            "prepare": prepared - started,
            "forward": forwarded - prepared,
            "sample": time.perf_counter() - forwarded,
        }
        return results

    def _take_in(self, batch: Batch) -> None:
        """Requests that come and go with this batch."""
        if self._torch_threads is not None:  # a setting of the calling thread
            torch.set_num_threads(self._torch_threads)
            self._torch_threads = None
        for request_id in batch.removed:
            self.states.pop(request_id, None)
        for added in batch.added:
            self.states[added.request_id] = RequestState(added, self.num_groups, self.grammars)

    def _inputs(self, chunks: list[Chunk]) -> tuple[torch.Tensor, BatchContext]:
        """Token ids [M] and the batch's context."""
        states = [self.states[chunk.request_id] for chunk in chunks]
        for chunk, state in zip(chunks, states, strict=True):
            for group, new in enumerate(chunk.new_block_ids):
                if new:
                    state.add_blocks(group, new)
        lengths = [chunk.length for chunk in chunks]
        query_starts = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        tokens = np.empty(num_tokens, dtype=np.int64)
        positions = np.empty(num_tokens, dtype=np.int64)
        for chunk, state, at in zip(chunks, states, query_starts.tolist(), strict=False):
            end = chunk.start + chunk.length
            tokens[at : at + chunk.length] = state.tokens[chunk.start : end]
            positions[at : at + chunk.length] = np.arange(chunk.start, end)
        kv_lens = np.array([chunk.start + chunk.length for chunk in chunks], dtype=np.int32)
        groups = tuple(self._group_view(g, states, query_starts, positions) for g in range(self.num_groups))
        context = BatchContext(
            positions=torch.from_numpy(positions),
            query_starts=torch.from_numpy(query_starts),
            kv_lens=torch.from_numpy(kv_lens),
            groups=groups,
            block_size=self.block_size,
            max_query_len=max(lengths),
            max_kv_len=int(kv_lens.max()),
        )
        return torch.from_numpy(tokens), context

    def _group_view(
        self,
        group: int,
        states: list[RequestState],
        query_starts: np.ndarray[tuple[int], np.dtype[np.int32]],
        positions: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> KVGroupView:
        width = max(state.num_blocks[group] for state in states)
        tables = np.zeros((len(states), width), dtype=np.int32)
        for row, state in enumerate(states):
            count = state.num_blocks[group]
            tables[row, :count] = state.tables[group][:count]
        rows = np.repeat(np.arange(len(states)), np.diff(query_starts))
        blocks = tables[rows, positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + positions % self.block_size
        return KVGroupView(torch.from_numpy(tables), torch.from_numpy(slots))

    def _results(self, chunks: list[Chunk], hidden: torch.Tensor) -> list[ChunkResult]:
        results: list[ChunkResult] = []
        rows, sampled = [], []
        end = 0
        for chunk in chunks:
            start, end = end, end + chunk.length
            state = self.states[chunk.request_id]
            if state.prompt_logprobs_due:
                gather_prompt_logprobs(self.model, state, chunk, hidden[start:end])
            if state.params.pooling is not None:
                pool_chunk(state, chunk, hidden[start:end])
                if chunk.sample:
                    results.append(ChunkResult(state.id, embedding=embedding_of(state)))
            elif chunk.sample:
                rows.append(end - 1)
                sampled.append(state)
        if not rows:
            return results
        logits = self.model.logits(hidden if len(rows) == len(hidden) else hidden[rows])
        for state, result in zip(sampled, self.sampler(logits, sampled), strict=True):
            state.take(result)
            if state.prompt_logprobs_due:
                result.prompt_logprobs = state.prompt_logprobs
                state.prompt_logprobs_due = False
            results.append(result)
        return results
