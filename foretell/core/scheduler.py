"""The scheduler: what runs in the next step. Token budget, admission, preemption and ageing, once for every
policy and every executor. It sees no clock: ages are counted in turns, so a replay decides the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from foretell.config import SchedulerConfig
from foretell.core.accept import accept
from foretell.core.admission import Admission
from foretell.core.blocks import BlockManager
from foretell.core.checks import check_priority, check_prompt_len
from foretell.core.counters import Counters
from foretell.core.messages import Added, Batch, Chunk, ChunkResult, Output, Result, Turn
from foretell.core.plan import Plan
from foretell.core.policy import get_policy
from foretell.core.request import Request, State
from foretell.core.waiting import AGED, WaitingQueue
from foretell.errors import ConfigError, InvalidRequestError

OVERDUE_RANK, AGED_RANK = -2, -1  # before every policy's ranks: running ones passed over, then aged prompts


class Scheduler:
    """Requests in, batches out. ``depth`` and ``chain`` are the executor's: batches in flight, and sampled
    tokens of one request that may be outstanding when its next token is scheduled."""

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, *, depth: int = 1, chain: int = 0) -> None:
        self.config = config
        self.blocks = blocks
        self.depth = depth
        self.chain = chain
        self.policy = get_policy(config.policy)
        self.chunk_cap = min(
            config.max_chunk_tokens or config.max_num_batched_tokens,
            config.max_num_batched_tokens,
            blocks.max_chunk_tokens,
        )
        if self.chunk_cap < 1:
            raise ConfigError("the KV cache is smaller than one sliding window: raise kv_cache_bytes")
        self.windowed = any(window is not None for window in blocks.windows)
        self.no_blocks: tuple[tuple[int, ...], ...] = ((),) * len(blocks.pools)
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []
        self.waiting = WaitingQueue(config.starvation_turns)
        self.admission = Admission(config, blocks, self.waiting, self.running)
        self.turn = 0
        self._orders = 0
        self._batches: dict[int, Batch] = {}
        self._next_batch_id = 0
        self._removed: list[int] = []
        self._preempted: list[tuple[int, str]] = []
        self.counters = Counters()

    # -- requests in and out ------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises InvalidRequestError if it could never run; nothing has changed then."""
        if request.id in self.requests:
            raise InvalidRequestError(f"request id {request.id} is in use")
        check_priority(request.key[0])
        self.check_prompt_len(request.prompt_len)
        limit = self.max_tokens_per_request
        wanted = request.params.max_tokens
        request.max_total_tokens = limit if wanted is None else min(limit, request.prompt_len + wanted)
        request.chain = 0 if request.params.waits_for_its_tokens else self.chain
        self._orders += 1
        request.order = self._orders
        request.key = (request.key[0], request.order)
        self.requests[request.id] = request
        self.waiting.push(request, self.turn)

    @property
    def max_tokens_per_request(self) -> int:
        """Prompt and answer together: the context, or what the whole cache holds."""
        return min(self.config.max_model_len, self.blocks.max_tokens_per_request)

    def check_prompt_len(self, prompt_len: int) -> None:
        """InvalidRequestError for a prompt that could never run. Reads constants only: any thread may call it."""
        check_prompt_len(prompt_len, self.config.max_model_len, self.max_tokens_per_request)

    def finish(self, request_id: int, reason: str) -> bool:
        """End a request now, whatever it is doing; False if it is not there (any more)."""
        request = self.requests.get(request_id)
        if request is None or request.state is State.FINISHED:
            return False
        if request.state is State.RUNNING:
            self.running.remove(request)
            self._removed.append(request_id)
        else:
            self.waiting.remove()
        request.state = State.FINISHED
        request.finish_reason = reason
        self._forget_if_idle(request)
        return True

    def _forget_if_idle(self, request: Request) -> None:
        """A finished request holds its blocks until its last batch in flight has come back."""
        if request.in_flight == 0:
            self.blocks.release(request)
            del self.requests[request.id]

    def preempt(self, request_id: int, reason: str) -> bool:
        """Take a running request's blocks and queue it again; it recomputes later. Not while in flight."""
        request = self.requests.get(request_id)
        if request is None or request.state is not State.RUNNING or request.in_flight:
            return False
        self.running.remove(request)
        self.blocks.release(request)
        request.planned = 0
        request.preemptions += 1
        self._removed.append(request.id)
        self._preempted.append((request.id, reason))
        request.progress_due = True
        by_reason = self.counters.preemptions
        by_reason[reason] = by_reason.get(reason, 0) + 1
        self.waiting.push(request, self.turn)
        return True

    @property
    def preemptions_by_reason(self) -> dict[str, int]:
        return self.counters.preemptions

    @property
    def num_batches(self) -> int:
        return self._next_batch_id

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    # -- schedule -----------------------------------------------------------------------------------

    def schedule(self, now: float) -> Turn | None:
        """The next batch, or None when nothing can be scheduled before a result or a request comes."""
        self.turn += 1
        plan = Plan(self.config.max_num_batched_tokens, self._max_seqs_in_batch())
        waiting_rank = self.policy.prefill_rank
        if self.waiting.num_aside:
            self.waiting.recall(self.blocks.expected)
        for rank, key, request in sorted(self._ranked_running()):  # keys are unique: requests are not compared
            if self.waiting:
                self._admit_before((rank, key), waiting_rank, plan, now)
            if plan.budget <= 0 or len(plan.chunks) >= plan.max_seqs:
                break
            # not preempted meanwhile by one before it, nor even admitted again since
            if request.state is State.RUNNING and request.last_turn < self.turn:
                self._try_plan(request, plan)
        self._admit_before(None, waiting_rank, plan, now)
        return self._submit(plan)

    def _submit(self, plan: Plan) -> Turn | None:
        if not plan.chunks:
            return None
        return self._submitted(Batch(self._next_batch_id, plan.chunks, plan.added, self._removed))

    def _submitted(self, batch: Batch) -> Turn:
        turn = Turn(self.turn, batch, self._preempted)
        self._removed, self._preempted = [], []
        self._next_batch_id += 1
        self._batches[batch.id] = batch
        return turn

    def skip_turns(self, count: int) -> None:
        """As if so many turns had been scheduled and taken in; what they did is the caller's (core.ahead)."""
        self.admission.skip_turns(self.turn + 1)
        self.turn += count
        self._next_batch_id += count

    def replace_in_flight(self, batch: Batch) -> None:
        """Of two batches in flight the later one, after turns that were skipped."""
        self._batches = {batch.id: batch}

    def _max_seqs_in_batch(self) -> int:
        """With a pipeline (several batches in flight, no chaining) each batch takes its share of the requests."""
        if self.depth > 1 and self.chain == 0:
            present = min(self.config.max_num_seqs, len(self.running) + self.num_waiting)
            return max(1, -(-present // self.depth))
        return self.config.max_num_seqs

    def _ranked_running(self) -> list[tuple[int, tuple[int, int], Request]]:
        return self._ranked(self.running)

    def _ranked(self, requests: Iterable[Request]) -> list[tuple[int, tuple[int, int], Request]]:
        """Running requests with something to compute; those passed over too long rank first."""
        overdue = self.turn - self.config.starvation_turns
        prefill_rank, decode_rank = self.policy.prefill_rank, self.policy.decode_rank
        ranked = []
        for request in requests:
            pending, planned, key = request.pending, request.planned, request.key
            total = len(request.tokens) + pending
            if pending > request.chain or planned >= total or (pending and total >= request.max_total_tokens):
                continue  # nothing to compute yet, or its last token is on the way
            prefill = planned < request.prefill_end
            if request.last_turn <= overdue:
                ranked.append((OVERDUE_RANK, key, request))
            elif prefill and key[0] == AGED:
                ranked.append((AGED_RANK, key, request))
            else:
                ranked.append((prefill_rank if prefill else decode_rank, key, request))
        return ranked

    def _try_plan(self, request: Request, plan: Plan) -> bool:
        """Plan the request's next chunk if phase, budget and memory allow."""
        start, pending = request.planned, request.pending
        prefill = start < request.prefill_end
        if prefill is not plan.prefill and plan.prefill is not None and not self.policy.mixes:
            return False
        if plan.blocked_from is not None and request.key > plan.blocked_from:
            return False
        length = remaining = len(request.tokens) + pending - start
        if length > 1:
            length = min(length, plan.budget, self.chunk_cap)
        if self.windowed:
            self.blocks.drop_outside_windows(request, start)
            if length > 1:
                others = len(self.running) - (request in self.running)
                length = self.blocks.fit_windows(request, start, length, spare=others)
        if length == 1 and start % self.config.block_size:
            new_blocks = self.no_blocks  # its place is in a block it holds: the usual case of a decode
        else:
            new_blocks = self._take_blocks(request, start + length)
            if not new_blocks:
                plan.blocked_from = request.key
                return False
        sample = length == remaining
        plan.chunks.append(Chunk(request.id, start, length, new_blocks, sample))
        plan.budget -= length
        plan.prefill = prefill
        request.planned = start + length
        request.pending = pending + sample
        request.in_flight += 1
        request.last_turn = self.turn
        return True

    def _take_blocks(self, request: Request, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """New blocks per group for the first ``num_tokens`` tokens, preempting if need be; () if there are none."""
        held = [len(table) for table in request.blocks]
        while not self.blocks.extend(request, num_tokens):
            if not self._preempt_for(request):
                return ()
        return tuple([tuple(table[n:]) for table, n in zip(request.blocks, held, strict=True)])

    def _preempt_for(self, request: Request) -> bool:
        """Preempt the last of the running requests behind this one; those in flight must return first."""
        victims = [r for r in self.running if r.key > request.key and r.in_flight == 0]
        return bool(victims) and self.preempt(max(victims, key=_key).id, "kv_blocks_exhausted")

    # -- admission ----------------------------------------------------------------------------------

    def _admit_before(self, bound: tuple[int, tuple[int, int]] | None, rank: int, plan: Plan, now: float) -> None:
        """Admit waiting requests that rank before ``bound`` (None: all that fit). Strictly in order: one
        that finds no room keeps those behind it waiting, or a large request would starve."""
        while not plan.full and not plan.admission_closed:
            request = self.waiting.first(self.turn)
            if request is None:
                return
            first = AGED_RANK if request.key[0] == AGED else rank
            if bound is not None and (first, request.key) > bound:
                return
            if not self._admit(request, plan, now) and self.waiting.first(self.turn) is request:
                plan.admission_closed = True

    def _admit(self, request: Request, plan: Plan, now: float) -> bool:
        if plan.blocked_from is not None or not self.admission.has_free_sequences(self.turn):
            return False
        if not self.policy.mixes and plan.prefill is False:
            return False
        cached = self.admission.find_room(request)
        if cached is None:
            return False
        self.blocks.attach(request, cached)
        request.prefill_end = len(request.tokens)
        first_blocks = tuple(tuple(table) for table in request.blocks)
        request.state = State.RUNNING
        if not self._try_plan(request, plan):
            request.state = State.WAITING
            self.blocks.release(request)
            request.planned = 0
            return False
        self._finish_admission(request, first_blocks, plan, now)
        return True

    def _finish_admission(
        self, request: Request, first_blocks: tuple[tuple[int, ...], ...], plan: Plan, now: float
    ) -> None:
        self.waiting.pop_first()
        self.running.append(request)
        self.admission.was_full = len(self.running) == self.config.max_num_seqs
        self.counters.peak_running = max(self.counters.peak_running, len(self.running))
        chunk = plan.chunks[-1]
        chunk.new_block_ids = tuple(
            shared + new for shared, new in zip(first_blocks, chunk.new_block_ids, strict=True)
        )
        prompt_len = request.prompt_len
        plan.added.append(Added(request.id, request.params, request.tokens[:prompt_len], request.tokens[prompt_len:]))
        if self.blocks.caching:
            self.counters.prefix_cache_queries += len(request.tokens)
            self.counters.prefix_cache_hits += request.cached_tokens
        if request.first_scheduled is None:
            request.first_scheduled = now

    # -- update -------------------------------------------------------------------------------------

    def update(self, result: Result) -> list[Output]:
        """Take in a finished batch: accept tokens, publish prefix hashes, end what has ended."""
        batch = self._batches.pop(result.batch_id)
        return self._take_in(batch.chunks, {r.request_id: r for r in result.results})

    def _take_in(self, chunks: Sequence[Chunk], by_request: Mapping[int, ChunkResult]) -> list[Output]:
        outputs: list[Output] = []
        block_size = self.config.block_size if self.blocks.caching else 1 << 62  # what is not cached is never full
        for chunk in chunks:
            request = self.requests[chunk.request_id]
            request.in_flight -= 1
            request.pending -= chunk.sample
            if request.state is State.FINISHED:
                self._forget_if_idle(request)  # a token past the end is dropped
                continue
            request.last_turn = self.turn
            news = by_request.get(chunk.request_id)
            computed = chunk.start + chunk.length
            # before the token is taken in: a request that it ends has published its prompt all the same
            if computed // block_size > request.published and (news is None or news.error is None):
                self.blocks.publish(request, computed)
            if news is not None:
                output = accept(request, news, self.counters)
                if output.finish_reason is not None:
                    self.finish(request.id, output.finish_reason)
                outputs.append(output)
        return outputs


def _key(request: Request) -> tuple[int, int]:
    return request.key
