"""One rank's work on a device that runs ahead of the CPU: submit enqueues a step and returns, collect waits for it.

Tokens stay where they are made: a chunk whose token the CPU has not seen yet reads the last token of its slot.
Every size that shapes a launch is known on the CPU, so nothing here waits for the device but ``collect``, and
the few requests whose next token takes the CPU (``SamplingParams.waits_for_its_tokens``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foretell.config import SchedulerConfig
from foretell.core.messages import Added, Batch, Chunk, ChunkResult
from foretell.core.params import SamplingParams
from foretell.kernels.base import KVLayer
from foretell.worker.device_sampler import DrawPlan, draw_tokens
from foretell.worker.pooling import embedding_of, pool_chunk
from foretell.worker.prompt_logprobs import gather_prompt_logprobs
from foretell.worker.sampler import Sampler
from foretell.worker.state import RequestState
from foretell.worker.step_buffers import StepBuffers, StepLayout, step_layout
from foretell.worker.step_ends import StepEnds, step_ends

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foretell.grammar.compiler import GrammarCompiler
    from foretell.model.transformer import Transformer
    from foretell.worker.cuda_graphs import StepGraphs

IN_FLIGHT = 3  # blocks of pinned memory: two steps in flight, and the one being filled
NOT_FINITE = "the model's logits are not finite: the weights or the dtype are unsuitable"


def _read_all_rows(states: list[RequestState]) -> bool:
    """Whether somebody wants more of the model than what follows each chunk."""
    return any(state.prompt_logprobs_due or state.params.pooling for state in states)


@dataclass(slots=True)
class Step:
    """A step that has been submitted: what its results will be made of."""

    batch: Batch
    states: list[RequestState]  # one per chunk
    sampled: Tensor  # [S] pinned; -1: not finite. Valid once ``ready``
    on_cpu: list[int] = field(default_factory=list)  # rows whose token the CPU chooses, from ``logits``
    logits: Tensor | None = None  # [len(on_cpu), vocab] float32, pinned
    ready: torch.cuda.Event | None = None
    launched_seconds: float = 0.0  # CPU time of submit


class DeviceRunner:
    """Turns batches into sampled tokens with a model and a KV cache on one device.

    ``kv`` has one block more per group than the scheduler knows of, ``spare_blocks``: padding goes there.
    """

    def __init__(
        self,
        model: Transformer,
        kv: list[KVLayer],
        config: SchedulerConfig,
        spare_blocks: tuple[int, ...],
        device: torch.device,
        *,
        ends: StepEnds | None = None,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.config = config
        self.device = device
        self.ends = ends or step_ends(device)
        self.graphs = graphs
        self.num_groups = len(spare_blocks)
        self.vocab_size = model.spec.vocab_size
        self.buffers = StepBuffers(
            config, spare_blocks, self.vocab_size, device, in_flight=IN_FLIGHT, logits_dtype=_logits_dtype(model)
        )
        self.draws = DrawPlan(config.max_num_seqs, device, in_flight=IN_FLIGHT)
        self.sampler = Sampler(self.vocab_size)
        self.states: dict[int, RequestState] = {}
        self.grammars: GrammarCompiler | None = None  # set by who knows the tokenizer
        self.slots: dict[int, int] = {}
        self.free_slots = list(range(config.max_num_seqs))[::-1]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._step = 0

    def release(self) -> None:
        """Let go of weights, KV cache and buffers; nothing can be executed any more."""
        if self.stream is not None:
            self.stream.synchronize()
        if self.graphs is not None:
            self.graphs.release()
        self.kv.clear()
        self.states.clear()
        del self.model, self.buffers, self.draws
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def use_kv(self, kv: list[KVLayer], spare_blocks: tuple[int, ...]) -> None:
        """Take another cache in place of the one so far, before the first batch."""
        self.kv = kv
        for table, block in zip(self.buffers.resident, spare_blocks, strict=True):
            table[self.buffers.spare_slot] = block

    @torch.inference_mode()
    def peak_bytes(self) -> tuple[int, int]:
        """Device memory that the largest step takes beside weights, cache and static buffers: of any kind, and of
        one token for each sequence. Measured by running them, as padding, which also loads what they need."""
        config, before = self.config, torch.cuda.memory_allocated(self.device)
        peaks = []
        for seqs, tokens in ((1, self.config.max_num_batched_tokens), (config.max_num_seqs, config.max_num_seqs)):
            torch.cuda.reset_peak_memory_stats(self.device)
            self._padding_step(seqs, min(tokens, config.max_model_len) if seqs == 1 else tokens)
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        return max(peaks), peaks[1]

    def _padding_step(self, num_seqs: int, num_tokens: int) -> None:
        layout = step_layout(num_seqs, num_tokens, self.num_groups)
        words = self.buffers.staging_host[0].numpy()
        words[: layout.new_blocks] = 0
        words[layout.slots] = self.buffers.spare_slot
        length = num_tokens // num_seqs
        words[layout.query_starts] = range(0, num_tokens + 1, length)
        blocks = -(-length // self.config.block_size)
        for first in layout.first_new:
            words[first] = blocks
        self.buffers.send(0, layout.new_blocks)
        self.ends.unpack(self.buffers, layout, length, [0] * self.num_groups)
        hidden = self._hidden(layout, length, length)
        logits = self._greedy(layout, hidden if length == 1 else hidden[-1:])
        params = SamplingParams(temperature=1.0, top_p=0.9)
        plan, width = self.draws.send(0, [(row, params, 0) for row in range(num_seqs)], self.vocab_size)
        draw_tokens(logits, plan, width)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- submit -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def submit(self, batch: Batch) -> Step:
        """Enqueue the batch. What was known of requests and blocks is brought up to date even if this fails."""
        started = time.perf_counter()
        if self.stream is not None:  # a setting of the calling thread, which others may have changed since
            torch.cuda.set_stream(self.stream)
        self._step += 1
        ring = self._step % IN_FLIGHT
        self._admit(batch)
        states = [self.states[chunk.request_id] for chunk in batch.chunks]
        logits = self._forward(batch.chunks, states, ring)
        step = self._sample(batch, states, logits, ring)
        if self.stream is not None:
            step.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            step.ready.record(self.stream)
        step.launched_seconds = time.perf_counter() - started
        return step

    def _admit(self, batch: Batch) -> None:
        for request_id in batch.removed:
            if self.states.pop(request_id, None) is not None:
                self.free_slots.append(self.slots.pop(request_id))
        for added in batch.added:
            self._add(added)

    def _add(self, added: Added) -> None:
        self.states[added.request_id] = RequestState(added, self.num_groups, self.grammars)
        self.slots[added.request_id] = self.free_slots.pop()

    def _forward(self, chunks: list[Chunk], states: list[RequestState], ring: int) -> Tensor:
        """Logits [≥ S, vocab] of the last token of every chunk; ``buffers.sampled`` has the likeliest tokens."""
        num_tokens = sum([chunk.length for chunk in chunks])
        decode = num_tokens == len(chunks)
        if decode and self.graphs is not None and (size := self._graph_size(self.graphs, states)):
            layout = step_layout(size, size, self.num_groups)
            self._send(layout, chunks, states, ring)
            return self.graphs.run(size, self._decode)
        layout = step_layout(len(chunks), num_tokens, self.num_groups)
        num_new = self._send(layout, chunks, states, ring)
        max_query_len = max([chunk.length for chunk in chunks])
        max_kv_len = max([chunk.start + chunk.length for chunk in chunks])
        self.ends.unpack(self.buffers, layout, max_query_len, num_new)
        last = None if decode else self.buffers.staging[layout.query_starts][1:] - 1
        only_last = None if _read_all_rows(states) else last
        bounds = [(chunk.start, chunk.length) for chunk in chunks]
        hidden = self._hidden(layout, max_query_len, max_kv_len, bounds, only_last)
        if only_last is None:
            self._prompt_logprobs(chunks, states, hidden)
            hidden = hidden if last is None else hidden.index_select(0, last)
        return self._greedy(layout, hidden)

    @staticmethod
    def _graph_size(graphs: StepGraphs, states: list[RequestState]) -> int:
        """Sequences of the smallest graph that holds these; 0: none does, or they want more than tokens."""
        return 0 if _read_all_rows(states) else graphs.size_for(len(states))

    def _decode(self, size: int) -> Tensor:
        """A step of one token for each of ``size`` sequences: what a CUDA graph holds."""
        layout = step_layout(size, size, self.num_groups)
        self.ends.unpack(self.buffers, layout, 1, None)
        return self._greedy(layout, self._hidden(layout, 1, self.config.max_model_len))

    def _hidden(
        self,
        layout: StepLayout,
        max_query_len: int,
        max_kv_len: int,
        chunks: Sequence[tuple[int, int]] = (),
        last_rows: Tensor | None = None,
    ) -> Tensor:
        context = self.buffers.context(layout, max_query_len, max_kv_len)
        context.chunks = chunks
        return self.model.forward(self.buffers.token_ids[: layout.num_tokens], context, self.kv, last_rows)

    def _greedy(self, layout: StepLayout, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden, self.buffers.logits[: len(hidden)])
        self.ends.greedy(self.buffers, layout, logits)
        return logits

    def _send(self, layout: StepLayout, chunks: list[Chunk], states: list[RequestState], ring: int) -> Sequence[int]:
        """Fill this step's block of words and copy it; new blocks per group."""
        words = self.buffers.staging_host[ring].numpy()
        spare = [self.buffers.spare_slot] * (layout.num_seqs - len(chunks))
        words[layout.slots] = [self.slots[chunk.request_id] for chunk in chunks] + spare
        words[layout.starts] = [chunk.start for chunk in chunks] + [0] * len(spare)
        tokens, lengths = words[layout.tokens], [chunk.length for chunk in chunks]
        if layout.num_tokens == layout.num_seqs:
            known = [
                state.tokens[chunk.start] if chunk.start < state.num_tokens else -1
                for chunk, state in zip(chunks, states, strict=True)
            ]
            tokens[:] = known + [0] * len(spare)
            words[layout.query_starts] = range(layout.num_seqs + 1)
        else:
            self._fill_tokens(tokens, chunks, states)
            words[layout.query_starts] = [0, *accumulate(lengths)]
        return self._send_blocks(layout, chunks, states, ring)

    @staticmethod
    def _fill_tokens(tokens: NDArray[np.int32], chunks: list[Chunk], states: list[RequestState]) -> None:
        at = 0
        for chunk, state in zip(chunks, states, strict=True):
            length, start = chunk.length, chunk.start
            if length == 1:
                tokens[at] = state.tokens[start] if start < state.num_tokens else -1
            else:
                tokens[at : at + length] = state.tokens[start : start + length]
            at += length

    def _send_blocks(
        self, layout: StepLayout, chunks: list[Chunk], states: list[RequestState], ring: int
    ) -> Sequence[int]:
        """New block ids, all of one group after the other, then the copy of everything."""
        words = self.buffers.staging_host[ring].numpy()
        pad = [0] * (layout.num_seqs - len(chunks))
        at, num_new = 0, []
        for group in range(self.num_groups):
            words[layout.first_new[group]] = [state.num_blocks[group] for state in states] + pad
            counts, before = [0] * (layout.num_seqs + 1), at
            for row, chunk in enumerate(chunks):
                new = chunk.new_block_ids[group]
                if new:
                    counts[row + 1] = self._put_blocks(words, layout.new_blocks + at, group, states[row], new)
                    at += counts[row + 1]
            counts[0] = before
            words[layout.new_starts[group]] = list(accumulate(counts)) if at > before else [before] * len(counts)
            num_new.append(at - before)
        self.buffers.send(ring, layout.new_blocks + at)
        return num_new

    def _put_blocks(
        self, words: NDArray[np.int32], at: int, group: int, state: RequestState, new: Sequence[int]
    ) -> int:
        """Ids that travel with the step; dropped blocks (-1) are never read, any valid id will do."""
        ids = [block if block > 0 else 0 for block in new]
        held = state.num_blocks[group]
        state.num_blocks[group] = held + len(new)
        if at + len(new) > len(words):  # a very long prefix hit goes ahead of the step, on its own
            self._write_table(group, self.slots[state.id], held, ids)
            return 0
        words[at : at + len(new)] = ids
        return len(new)

    def _write_table(self, group: int, slot: int, first: int, blocks: Sequence[int]) -> None:
        ids = torch.tensor(blocks, dtype=torch.int32)
        self.buffers.resident[group][slot, first : first + len(blocks)] = ids.to(self.device)

    # -- sampling -----------------------------------------------------------------------------------

    def _sample(self, batch: Batch, states: list[RequestState], logits: Tensor, ring: int) -> Step:
        """Rows that draw overwrite their likeliest token; tokens, and logits for the CPU, are on their way back."""
        drawn, on_cpu = [], []
        for row, (chunk, state) in enumerate(zip(batch.chunks, states, strict=True)):
            if state.choice == "likeliest" or not chunk.sample:
                continue
            if state.choice == "on_cpu":
                on_cpu.append(row)
            else:
                drawn.append((row, state.params, chunk.start + chunk.length - state.prompt_len))
        count = len(batch.chunks)
        if drawn:
            plan, width = self.draws.send(ring, drawn, self.vocab_size)
            tokens, rows = draw_tokens(logits, plan, width), plan[0].long()
            self.buffers.sampled.index_copy_(0, rows, tokens)
            slots = self.buffers.staging[: self.buffers.max_seqs].index_select(0, rows)  # a layout begins with them
            self.buffers.last_token.index_copy_(0, slots.long(), tokens)
        host = self.buffers.sampled_host[ring][:count]
        host.copy_(self.buffers.sampled[:count], non_blocking=True)
        return Step(batch, states, host, on_cpu, self._copy_rows(logits, on_cpu) if on_cpu else None)

    def _copy_rows(self, logits: Tensor, rows: list[int]) -> Tensor:
        if self.stream is None:
            return logits[rows].float()
        at = torch.tensor(rows, pin_memory=True).to(self.device, non_blocking=True)
        host = torch.empty(len(rows), self.vocab_size, dtype=torch.float32, pin_memory=True)
        return host.copy_(logits.index_select(0, at).float(), non_blocking=True)

    def _prompt_logprobs(self, chunks: list[Chunk], states: list[RequestState], hidden: Tensor) -> None:
        at = 0
        for chunk, state in zip(chunks, states, strict=True):
            if state.params.pooling is not None:
                pool_chunk(state, chunk, hidden[at : at + chunk.length])
            if state.prompt_logprobs_due:  # rare, and waits for the device
                gather_prompt_logprobs(self.model, state, chunk, hidden[at : at + chunk.length])
            at += chunk.length

    # -- collect ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def collect(self, step: Step) -> list[ChunkResult]:
        """Wait for a step; results for chunks that sample, in batch order. Steps are collected in order."""
        if step.ready is not None:
            step.ready.synchronize()
        chosen: dict[int, ChunkResult] = {}
        if step.logits is not None:
            states = [step.states[row] for row in step.on_cpu]
            chosen = dict(zip(step.on_cpu, self.sampler(step.logits, states), strict=True))
        results = []
        for row, (chunk, state, token) in enumerate(
            zip(step.batch.chunks, step.states, step.sampled.tolist(), strict=True)
        ):
            if not chunk.sample:
                continue
            if state.params.pooling is not None:
                result = ChunkResult(state.id, embedding=embedding_of(state))
            elif row in chosen:
                result = chosen[row]
            else:
                result = ChunkResult(state.id, token) if token >= 0 else ChunkResult(state.id, error=NOT_FINITE)
            state.take(result)
            if state.prompt_logprobs_due:
                result.prompt_logprobs = state.prompt_logprobs
                state.prompt_logprobs_due = False
            results.append(result)
        return results


def _logits_dtype(model: Transformer) -> torch.dtype:
    """The head's own where nothing is done to its scores: a float32 copy would say no more."""
    if model.embedding is None or model.head is None or model.head.divisor != 1.0:
        return torch.float32
    return model.embedding.dtype
