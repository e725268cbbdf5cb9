"""Decodes in lockstep, for virtual time: requests that all get one token in every step are kept as one group.

A step of the group costs the same whether it has three members or three hundred: what it does to each of them (a
token more, a position further) is worked out when it matters, at the end of the request or when it must be preempted.
Only what one member does and another does not is done one by one and at once: taking a block, publishing a full one,
ending. Batches, blocks, tokens and times are those of ``Scheduler``, whose decisions these are. Where the members
could be treated unequally (too few blocks, too small a budget, somebody passed over for too long) the group is
dissolved into ordinary requests for some turns.
"""

from __future__ import annotations

from typing import Any, Protocol

from foretell.core.ahead import FOREVER
from foretell.core.group import Group, GroupBatch, Member, PlainPool, Together, in_order
from foretell.core.messages import Chunk, ChunkResult, Output, Result, Turn
from foretell.core.plan import Plan
from foretell.core.request import Request, State
from foretell.core.scheduler import Scheduler
from foretell.core.waiting import AGED

APART = 8  # turns for which a dissolved group stays so


class Voice(Protocol):
    """Who knows what is sampled, before it is: a virtual executor."""

    def output_tokens(self, request_id: int, first: int, end: int) -> list[int]:
        """The tokens of a request's output positions [first, end)."""
        ...

    def resume(self, request_id: int, outputs: int) -> None:
        """From now on the request is sampled from one by one; so many outputs were submitted so far."""
        ...


class _Place:
    """Stands for all members in the order of a turn: before any other request of its rank."""

    state, last_turn, key = State.RUNNING, -1, (-FOREVER, -1)


class LockstepScheduler(Scheduler):
    """``loose``: running requests that are no members, nor at their last token as one. For one full-attention cache
    after another (no windows) and executors that are not pipelines."""

    voice: Voice

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.windowed or not (self.depth == 1 or (self.depth == 2 and self.chain)):
            raise RuntimeError("decodes go in lockstep without sliding windows and pipelines only")
        if not self.blocks.caching:
            self.blocks.pools = [PlainPool(pool.num_blocks) for pool in self.blocks.pools]  # type: ignore[misc]
        self.group = Group(self.config.block_size)
        self.loose: dict[int, Request] = {}
        self._scheduled_turn = self._returned_turn = 0
        self._oldest = 0  # no member was passed over for longer than since this turn
        self._apart_until = 0
        self._place: Any = _Place()
        self._now = 0.0
        self._planned: tuple[Together, Plan] | None = None  # of the turn that is being decided

    # -- joining and leaving -------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        super().add(request)
        if request.stop_ids or request.params.waits_for_its_tokens or request.params.reads_every_position:
            self._apart_until = FOREVER  # its end is not known before
            self.dissolve()

    def gather(self) -> None:
        """Let those join who decode from the next turn on."""
        turn = self.turn + 1
        if turn < self._apart_until:
            return
        overdue = turn - self.config.starvation_turns
        ready = [request for request in self.loose.values() if self._is_ready(request)]
        if any(r.last_turn <= overdue for r in ready) or (self.group.members and self._oldest <= overdue):
            self.dissolve()
            return
        for request in ready:
            self._join(request)

    def _is_ready(self, request: Request) -> bool:
        if request.planned < request.prefill_end or request.pending > request.chain:
            return False
        return not request.pending or len(request.tokens) + request.pending < request.max_total_tokens

    def _join(self, request: Request) -> None:
        self._oldest = min(self._oldest, request.last_turn) if self.group.members else request.last_turn
        self.group.join(request)
        del self.loose[request.id]

    def dissolve(self) -> None:
        """Make ordinary requests of the members, as if they had been so all along."""
        flying = [b for b in self._batches.values() if isinstance(b, GroupBatch) and b.together is not None]
        parts = [batch.together for batch in flying if batch.together is not None]
        if self._planned is not None:
            parts.append(self._planned[0])
        leavers = [member for part in parts for member in part.leavers]
        everybody = sorted([*self.group.members.values(), *leavers], key=in_order)
        for member in everybody:
            self._release(member)
        for batch in flying:
            if (part := batch.together) is not None:
                chunks = self._chunks(part, everybody)
                batch.chunks[part.at : part.at] = chunks
                batch.told = [self._sampled(chunk) for chunk in chunks]
                batch.together = None
        if self._planned is not None:
            part, plan = self._planned
            plan.chunks[part.at : part.at] = self._chunks(part, everybody)
            plan.max_seqs += part.count
            self._planned = None
        self.group.clear()
        if everybody:
            self._apart_until = max(self._apart_until, self.turn + APART)

    def _release(self, member: Member) -> None:
        request, last = member.request, min(self.group.scheduled, member.due)
        self._catch_up(member)
        request.planned = member.start(last) + 1
        outstanding = max(0, last - max(self.group.returned, member.joined))
        request.pending += outstanding
        request.in_flight += outstanding
        if self.group.scheduled > member.joined:
            request.last_turn = max(request.last_turn, self._scheduled_turn)
        if self.group.returned > member.joined:
            request.last_turn = max(request.last_turn, self._returned_turn)
        self.loose[request.id] = request
        planned = self._planned is not None and member.joined < self._planned[0].step <= member.due  # not submitted
        self.voice.resume(request.id, request.num_outputs + request.pending - planned)

    def _catch_up(self, member: Member) -> None:
        """Give the request the tokens that have come back."""
        if self.group.returned > member.joined:
            request = member.request
            known = member.start(min(self.group.returned, member.due)) + 2
            request.tokens += self.voice.output_tokens(request.id, request.num_outputs, known - request.prompt_len)

    def _chunks(self, part: Together, members: list[Member]) -> list[Chunk]:
        """What each of these has in this part of a batch."""
        inside = [member for member in members if member.joined < part.step <= member.due]
        return [self.chunk(member, part.step) for member in inside]

    def chunk(self, member: Member, step: int) -> Chunk:
        start, size = member.start(step), self.config.block_size
        tables = member.request.blocks
        new = self.no_blocks if start % size else tuple([(table[start // size],) for table in tables])
        return Chunk(member.request.id, start, 1, new, True)

    def _sampled(self, chunk: Chunk) -> ChunkResult:
        index = chunk.start + 1 - self.requests[chunk.request_id].prompt_len
        return ChunkResult(chunk.request_id, self.voice.output_tokens(chunk.request_id, index, index + 1)[0])

    # -- schedule ------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Turn | None:
        self._now = now
        self.gather()
        return super().schedule(now)

    def _ranked_running(self) -> list[tuple[int, tuple[int, int], Request]]:
        ranked = self._ranked(self.loose.values())
        if self.group.members:
            ranked.append((self.policy.decode_rank, self._place.key, self._place))
        return ranked

    def _try_plan(self, request: Request, plan: Plan) -> bool:
        if request is not self._place:
            return super()._try_plan(request, plan)
        if self.group.members and plan.prefill and not self.policy.mixes:
            return False
        if self.group.members and plan.blocked_from is None and len(self.group.members) <= plan.budget:
            part = self.step(len(plan.chunks))
        else:
            part = None
        if part is not None:
            plan.budget -= part.count
            plan.max_seqs -= part.count
            plan.prefill = False
            self._planned = part, plan
            return True
        self.dissolve()
        return self._plan_singly(plan)

    def _plan_singly(self, plan: Plan) -> bool:
        """The decodes of this turn one by one, as ``schedule`` would have."""
        rank, any_planned = self.policy.decode_rank, False
        for found, key, request in sorted(self._ranked(self.loose.values())):
            if found != rank or request.planned < request.prefill_end:
                continue
            if self.waiting:
                self._admit_before((rank, key), self.policy.prefill_rank, plan, self._now)
            if plan.budget <= 0 or len(plan.chunks) >= plan.max_seqs:
                break
            if request.state is State.RUNNING and request.last_turn < self.turn:
                any_planned |= super()._try_plan(request, plan)
        return any_planned

    def quiet_turns(self) -> int:
        """The number of coming turns in which surely no loose request is scheduled, as long as members decode."""
        policy, waits = self.policy, self.config.starvation_turns
        if not self.loose:
            return FOREVER
        if policy.mixes or policy.prefill_rank < policy.decode_rank:
            return 0
        if any(request.key[0] == AGED or not request.in_prefill for request in self.loose.values()):
            return 0
        return min(request.last_turn for request in self.loose.values()) + waits - self.turn - 1

    def step(self, at: int) -> Together | None:
        """Plan the group's next step, a token of every member. Without blocks for that: None, nothing is changed."""
        takers = self.group.takers()
        if takers:
            pools, wanted = self.blocks.pools, len(takers)
            for pool in pools:
                if len(pool.free) < wanted:
                    return None
            for member in sorted(takers.values(), key=in_order) if wanted > 1 else takers.values():
                for table, pool in zip(member.request.blocks, pools, strict=True):
                    table += pool.take(1)
        self._scheduled_turn = self._oldest = self.turn
        return self.group.advance(at)

    def step_alone(self) -> Together | None:
        """A whole turn in which there is nothing but the group's step; None if there are no blocks for that."""
        self.turn += 1
        part = self.step(0)
        if part is None:
            self.turn -= 1
            return None
        self._next_batch_id += 1
        self._removed.clear()
        return part

    def _submit(self, plan: Plan) -> Turn | None:
        if self._planned is None:
            return super()._submit(plan)
        part, self._planned = self._planned[0], None
        return self._submitted(GroupBatch(self._next_batch_id, plan.chunks, plan.added, self._removed, part))

    # -- update --------------------------------------------------------------------------------------

    def update(self, result: Result) -> list[Output]:
        batch = self._batches[result.batch_id]
        if not isinstance(batch, GroupBatch) or batch.together is None:
            if isinstance(batch, GroupBatch):
                result.results += batch.told
            return super().update(result)
        part = batch.together
        del self._batches[result.batch_id]
        by_request = {r.request_id: r for r in result.results}
        before = self._take_in(batch.chunks[: part.at], by_request)
        return [*before, *self.take_back(part), *self._take_in(batch.chunks[part.at :], by_request)]

    def take_back(self, part: Together) -> list[Output]:
        """A step of the group has come back. News of those alone whom it ends."""
        self.group.returned = step = part.step
        self._returned_turn = self.turn
        self.counters.generation_tokens += part.count
        if self.blocks.caching:
            for member in sorted(self.group.filled(part), key=in_order):
                self._catch_up(member)
                self.blocks.publish(member.request, member.start(step) + 1)
        outputs = []
        for member in part.leavers:
            self._catch_up(member)
            request = member.request
            request.planned = member.start(step) + 1
            request.last_turn = self.turn
            super().finish(request.id, "length")
            outputs.append(Output(request.id, request.tokens[-1], finish_reason="length", progress=request.progress))
        return outputs

    # -- requests in and out, one by one -------------------------------------------------------------

    def finish(self, request_id: int, reason: str) -> bool:
        request = self.requests.get(request_id)
        if request is not None and request.state is State.RUNNING and request_id not in self.loose:
            self.dissolve()
        done = super().finish(request_id, reason)
        self.loose.pop(request_id, None)
        return done

    def preempt(self, request_id: int, reason: str) -> bool:
        if request_id not in self.loose:
            self.dissolve()
        done = super().preempt(request_id, reason)
        if done:
            del self.loose[request_id]
        return done

    def _preempt_for(self, request: Request) -> bool:
        self.dissolve()
        return super()._preempt_for(request)

    def _finish_admission(
        self, request: Request, first_blocks: tuple[tuple[int, ...], ...], plan: Plan, now: float
    ) -> None:
        super()._finish_admission(request, first_blocks, plan, now)
        self.loose[request.id] = request
