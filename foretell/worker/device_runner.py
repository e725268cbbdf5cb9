"""One rank's work on a device that runs ahead of the CPU: submit enqueues a step and returns, collect waits for it.

Tokens stay where they are made: a chunk whose token the CPU has not seen yet reads the last token of its slot.
Every size that shapes a launch is known on the CPU, so nothing here waits for the device but ``collect``, and
the few requests whose next token takes the CPU (``SamplingParams.waits_for_its_tokens``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foretell.config import SchedulerConfig
from foretell.core.messages import Added, Batch, Chunk, ChunkResult
from foretell.core.params import SamplingParams
from foretell.kernels.base import BatchContext, KVLayer
from foretell.worker.device_sampler import DrawPlan, draw_tokens
from foretell.worker.device_step import Step, results_of
from foretell.worker.pooling import pool_chunk
from foretell.worker.prompt_logprobs import gather_prompt_logprobs
from foretell.worker.sampler import Sampler
from foretell.worker.state import RequestState
from foretell.worker.step_buffers import StepBuffers, StepLayout, step_layout
from foretell.worker.step_ends import StepEnds, step_ends
from foretell.worker.step_words import StepWords

if TYPE_CHECKING:
    from foretell.grammar.compiler import GrammarCompiler
    from foretell.model.transformer import Transformer
    from foretell.worker.cuda_graphs import StepGraphs

IN_FLIGHT = 3  # blocks of pinned memory: two steps in flight, and the one being filled


def _read_all_rows(states: list[RequestState]) -> bool:
    """Whether somebody wants more of the model than what follows each chunk."""
    return any(state.prompt_logprobs_due or state.params.pooling for state in states)


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
        vocab_size: int | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        """``vocab_size``: the logits' width, where the model's spec is a shard's. ``in_flight``: steps that may be
        submitted and not yet collected, the one being filled included."""
        self.model = model
        self.kv = kv
        self.config = config
        self.device = device
        self.ends = ends or step_ends(device)
        self.graphs = graphs
        self.num_groups = len(spare_blocks)
        self.vocab_size = vocab_size or model.spec.vocab_size
        self.buffers = StepBuffers(
            config, spare_blocks, self.vocab_size, device, in_flight=in_flight, logits_dtype=_logits_dtype(model)
        )
        self.draws = DrawPlan(config.max_num_seqs, device, in_flight=in_flight)
        self.in_flight = in_flight
        self.sampler = Sampler(self.vocab_size)
        self.states: dict[int, RequestState] = {}
        self.grammars: GrammarCompiler | None = None  # set by who knows the tokenizer
        self.slots: dict[int, int] = {}
        self.words = StepWords(self.buffers, self.slots)
        self.free_slots = list(range(config.max_num_seqs))[::-1]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._step = 0

    @property
    def nbytes(self) -> int:
        """Device memory of static buffers."""
        return self.buffers.nbytes + self.draws.device.nbytes

    def release(self) -> None:
        """Let go of weights, KV cache and buffers; nothing can be executed any more."""
        if self.stream is not None:
            self.stream.synchronize()
        if self.graphs is not None:
            self.graphs.release()
        self.kv.clear()
        self.states.clear()
        del self.model, self.buffers, self.words, self.draws
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
        before, peaks = torch.cuda.memory_allocated(self.device), []
        for seqs, length in (largest_step(self.config), (self.config.max_num_seqs, 1)):
            torch.cuda.reset_peak_memory_stats(self.device)
            self._padding_step(seqs, seqs * length)
            peaks.append(torch.cuda.max_memory_allocated(self.device) - before)
        return max(peaks), peaks[1]

    def _padding_step(self, num_seqs: int, num_tokens: int) -> None:
        layout = step_layout(num_seqs, num_tokens, self.num_groups)
        self.words.send_padding(layout)
        length = num_tokens // num_seqs
        self.ends.unpack(self.buffers, layout, length, [0] * self.num_groups)
        hidden = self._hidden(layout, length, length)
        logits = self._greedy(layout, hidden[-num_seqs:])
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
        ring = self._step % self.in_flight
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
            self.words.send(layout, chunks, states, ring)
            return self.graphs.run(size, self._decode)
        layout = step_layout(len(chunks), num_tokens, self.num_groups)
        num_new = self.words.send(layout, chunks, states, ring)
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
        return self._through(layout.num_tokens, context, last_rows)

    def _through(self, num_tokens: int, context: BatchContext, last_rows: Tensor | None) -> Tensor:
        """The buffers' tokens through the model: hidden states [M, h], or with ``last_rows`` theirs alone."""
        return self.model.forward(self.buffers.token_ids[:num_tokens], context, self.kv, last_rows)

    def _greedy(self, layout: StepLayout, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden, self.buffers.logits[: len(hidden)])
        self.ends.greedy(self.buffers, layout, logits)
        return logits

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
        return results_of(step, self.sampler)


def largest_step(config: SchedulerConfig) -> tuple[int, int]:
    """Sequences of a step of the most tokens that there can be, and the tokens of each: as few and long as may be."""
    most = config.max_num_batched_tokens
    seqs = min(-(-most // config.max_model_len), config.max_num_seqs)
    return seqs, min(most // seqs, config.max_model_len)


def _logits_dtype(model: Transformer) -> torch.dtype:
    """The head's own where nothing is done to its scores: a float32 copy would say no more."""
    if model.head is None or model.head.divisor != 1.0:
        return torch.float32
    return model.activation_dtype
