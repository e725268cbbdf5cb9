"""Requests that get a token in every step: who they are, how far they are, and who of them ends or fills a block."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from foretell.core.messages import Batch, ChunkResult
from foretell.core.request import Request


@dataclass(slots=True, eq=False)
class Member:
    """A request that came after step ``joined`` of the group, when the next position to compute was ``base``; step
    ``due`` brings its last token."""

    request: Request
    joined: int
    base: int
    due: int

    def start(self, step: int) -> int:
        """The position that a step computes."""
        return self.base + step - self.joined - 1


@dataclass(slots=True)
class Together:
    """The group's part of a batch: its ``step``-th, of ``count`` sequences with ``kv_tokens`` keys together, the last
    one for ``leavers``. It stands after the first ``at`` chunks of the batch."""

    step: int
    at: int
    count: int
    kv_tokens: int
    leavers: list[Member]


@dataclass(slots=True)
class GroupBatch(Batch):
    """A batch with one more token for each member. ``told``: what comes of those that were members when it was
    submitted and are no more."""

    together: Together | None = None
    told: list[ChunkResult] = field(default_factory=list)


class PlainPool:
    """A ``BlockPool`` of a cache in which nothing is looked for: what was given back last is taken first, many blocks
    at the cost of one."""

    evictions = 0

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(reversed(range(num_blocks)))  # the next one last
        self.cached: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self.free)

    def take(self, count: int) -> list[int]:
        """``count`` blocks; the caller has checked that so many are free."""
        if count == 1:
            return [self.free.pop()]
        left = len(self.free) - count
        taken = self.free[left:]
        del self.free[left:]
        taken.reverse()
        return taken

    def release(self, blocks: Iterable[int]) -> None:
        self.free.extend(blocks)
        if len(self.free) > self.num_blocks:
            raise RuntimeError("KV blocks released twice")


def in_order(member: Member) -> tuple[int, int]:
    """The scheduler's order: priority, then arrival."""
    return member.request.key


class Group:
    """``scheduled`` and ``returned`` count its steps; ``kv_tokens``: keys of all members together at their next step.
    Members stand by the phase of their blocks: those of one phase begin their blocks in the same steps."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.members: dict[int, Member] = {}
        self.scheduled = self.returned = 0
        self.kv_tokens = 0
        self._phases: list[dict[int, Member]] = [{} for _ in range(block_size)]
        self._due: list[int] = []  # steps in which members end, a heap
        self._due_at: dict[int, list[Member]] = {}
        self._leavers: list[Member] = []  # of the last step that was planned

    def __len__(self) -> int:
        return len(self.members)

    def join(self, request: Request) -> None:
        """From the next step on."""
        due = self.scheduled + request.max_total_tokens - len(request.tokens) - request.pending
        member = Member(request, self.scheduled, request.planned, due)
        self.members[request.id] = member
        self.kv_tokens += request.planned + 1
        self._phase_of(request.planned)[request.id] = member
        if due not in self._due_at:
            self._due_at[due] = []
            heapq.heappush(self._due, due)
        self._due_at[due].append(member)

    def _phase_of(self, position: int) -> dict[int, Member]:
        """Those who, with the one that computes this position in the next step, begin a block."""
        return self._phases[(position - self.scheduled - 1) % self.block_size]

    def takers(self) -> dict[int, Member]:
        """Who begins a block in the next step."""
        return self._phases[-(self.scheduled + 1) % self.block_size]

    def advance(self, at: int) -> Together:
        """The next step, after ``at`` other chunks of its batch. Whose last it is are members no more."""
        self.scheduled = step = self.scheduled + 1
        part = Together(step, at, len(self.members), self.kv_tokens, [])
        self.kv_tokens += part.count
        if self._due and self._due[0] == step:
            heapq.heappop(self._due)
            part.leavers = sorted(self._due_at.pop(step), key=in_order)
            for member in part.leavers:
                del self.members[member.request.id]
                next_start = member.start(step) + 1
                self.kv_tokens -= next_start + 1
                del self._phase_of(next_start)[member.request.id]
        self._leavers = part.leavers
        return part

    def filled(self, part: Together) -> Iterator[Member]:
        """Whose block this step has filled."""
        size = self.block_size
        yield from (m for m in self._phases[-(part.step + 1) % size].values() if m.joined < part.step)
        # with two batches in flight some have left since, at the step after this one
        left = part.leavers if self._leavers is part.leavers else [*part.leavers, *self._leavers]
        for member in left:
            if member.joined < part.step and (member.start(part.step) + 1) % size == 0:
                yield member

    def clear(self) -> None:
        """Nobody is a member any more; steps go on counting."""
        self.members.clear()
        self._due.clear()
        self._due_at.clear()
        for phase in self._phases:
            phase.clear()
        self.kv_tokens, self._leavers = 0, []
