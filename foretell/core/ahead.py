"""Many decode steps at once, where nothing else can happen between them: for virtual time.

While no request arrives, ends, waits for room or wants more blocks than are free, every turn schedules the same
requests for one token each. Such a stretch is taken in one go, with the batches, blocks and tokens that the single
turns would have given, in the same order: only the time it takes to find out is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foretell.core.request import Request

if TYPE_CHECKING:
    from foretell.core.scheduler import Scheduler


@dataclass(slots=True)
class Stretch:
    """``finished[j]`` is when step j ended, in seconds; every request got one token in each. ``new_blocks``: (step,
    request id, blocks per KV group), where a step began with taking some."""

    request_ids: list[int]  # in the order of the batch
    starts: list[int]  # position of each one's first chunk
    first_batch_id: int
    finished: Sequence[float]
    new_blocks: list[tuple[int, int, tuple[tuple[int, ...], ...]]] = field(default_factory=list)


def decoding(scheduler: Scheduler) -> list[Request]:
    """The running requests in the order of their batch, if the next turns can only decode all of them; else []."""
    config, running = scheduler.config, scheduler.running
    if not running or scheduler.depth > 1 or scheduler.windowed or len(running) > config.max_num_batched_tokens:
        return []
    if scheduler.num_waiting and len(running) < config.max_num_seqs:
        return []  # one may be let in
    overdue = scheduler.turn + 1 - config.starvation_turns
    for request in running:
        planned = request.planned
        if request.in_flight or planned < request.prefill_end or planned != len(request.tokens) - 1:
            return []
        if request.last_turn <= overdue or request.progress_due:
            return []
    return sorted(running, key=lambda request: request.key)


def most_steps(scheduler: Scheduler, requests: Sequence[Request]) -> int:
    """Steps before one of them may end or need a block that is not free."""
    steps = min(request.max_total_tokens - len(request.tokens) for request in requests) - 1
    free = min(pool.num_free for pool in scheduler.blocks.pools)
    size = scheduler.config.block_size
    until_next = [-request.planned % size for request in requests]  # steps before each one takes a block
    low, high = 0, max(0, steps)
    while low < high:  # the most for which the blocks suffice
        middle = (low + high + 1) // 2
        if sum(-(-(middle - wait) // size) for wait in until_next if wait < middle) <= free:
            low = middle
        else:
            high = middle - 1
    return low


def advance(
    scheduler: Scheduler, requests: Sequence[Request], tokens: Sequence[list[int]], finished: Sequence[float]
) -> Stretch:
    """Take ``len(finished)`` steps in which ``requests[i]`` gets ``tokens[i]``."""
    steps = len(finished)
    starts = [request.planned for request in requests]
    stretch = Stretch([r.id for r in requests], starts, scheduler.num_batches, finished)
    scheduler.skip_turns(steps)
    for request, new in zip(requests, tokens, strict=True):
        request.tokens.extend(new)
        request.planned += steps
        request.last_turn = scheduler.turn
    scheduler.counters.generation_tokens += steps * len(requests)
    _move_blocks(scheduler, requests, starts, stretch)
    return stretch


def _move_blocks(scheduler: Scheduler, requests: Sequence[Request], starts: Sequence[int], stretch: Stretch) -> None:
    """Take and publish blocks in the order of the single steps: of each, first all takings, then all publishings."""
    blocks, size, steps = scheduler.blocks, scheduler.config.block_size, len(stretch.finished)
    events = []
    for order, (request, start) in enumerate(zip(requests, starts, strict=True)):
        first = -start % size  # the step that writes a block's first slot
        events += [(step, 0, order, request) for step in range(first, steps, size)]
        if blocks.caching:
            full = (-start - 1) % size  # the step that writes a block's last slot
            events += [(step, 1, order, request) for step in range(full, steps, size)]
    for step, publishes, order, request in sorted(events, key=lambda event: event[:3]):
        reached = starts[order] + step + 1
        if publishes:
            blocks.publish(request, reached)
            continue
        held = [len(table) for table in request.blocks]
        if not blocks.extend(request, reached):
            raise RuntimeError("a stretch of decodes ran out of blocks: it was taken for longer than they last")
        new = tuple(tuple(table[n:]) for table, n in zip(request.blocks, held, strict=True))
        stretch.new_blocks.append((step, request.id, new))
