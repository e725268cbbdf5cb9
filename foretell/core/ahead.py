"""Many decode steps at once, where nothing else can happen between them: for virtual time.

While no request arrives, ends, waits for room or wants more blocks than are free, every turn schedules the same
requests for one token each. Such a stretch is taken in one go, with the batches, blocks and tokens that the single
turns would have given, in the same order: only the time it takes to find out is less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from foretell.core.messages import Batch, Chunk
from foretell.core.request import Request
from foretell.core.waiting import AGED

if TYPE_CHECKING:
    from foretell.core.scheduler import Scheduler


FOREVER = 1 << 62  # turns


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
    """The running requests in the order of their batch, if the next turns can only decode all of them; else []. With
    two batches in flight the first of them holds these very requests, and nothing else."""
    config, running = scheduler.config, scheduler.running
    if not running or not (scheduler.depth == 1 or (scheduler.depth == 2 and scheduler.chain)):
        return []
    if len(running) > config.max_num_batched_tokens:
        return []
    overlapped = scheduler.depth - 1
    overdue = scheduler.turn + 1 - config.starvation_turns
    for request in running:
        planned = request.planned
        if request.in_flight != overlapped or planned < request.prefill_end:
            return []
        if planned != len(request.tokens) - 1 + overlapped or request.chain < overlapped:
            return []
        if request.last_turn <= overdue or request.progress_due:
            return []
    return sorted(running, key=lambda request: request.key)


def holds_all(batch: Batch, requests: Sequence[Request]) -> bool:
    """Whether a batch in flight is one token of each of these requests, in their order, and nothing else."""
    return len(batch.chunks) == len(requests) and all(
        chunk.request_id == request.id and chunk.length == 1 and chunk.sample
        for chunk, request in zip(batch.chunks, requests, strict=True)
    )


def last_batch(scheduler: Scheduler, requests: Sequence[Request]) -> Batch:
    """What is in flight after a stretch: the last step of each request."""
    chunks = [Chunk(request.id, request.planned - 1, 1, scheduler.no_blocks, True) for request in requests]
    return Batch(scheduler.num_batches - 1, chunks)


def closed_turns(scheduler: Scheduler) -> int:
    """The number of coming turns in which surely nobody is let in, as long as the running requests only decode, none
    ends and there are blocks for them."""
    waiting, turn = scheduler.waiting, scheduler.turn + 1
    free = scheduler.config.max_num_seqs - len(scheduler.running)
    if not waiting or free <= 0:
        return FOREVER
    if waiting.num_aside or len(scheduler.running) >= scheduler.config.max_num_batched_tokens:
        return 0
    first = waiting.first(turn)
    if first is None:
        return 0
    if (until := scheduler.admission.opens_at(turn)) > turn:
        return until - turn
    if scheduler.admission.was_full:
        return 0  # they open in this turn, which changes the scheduler
    ages_at = waiting.ages_at()
    until_aged = FOREVER if ages_at is None else ages_at - turn
    policy = scheduler.policy
    if not policy.mixes and policy.decode_rank < policy.prefill_rank and first.key[0] != AGED:
        return until_aged
    return until_aged if scheduler.admission.stays_refused(first) else 0


def most_steps(scheduler: Scheduler, requests: Sequence[Request]) -> int:
    """Steps before one of them may end, or need a block that is not free, or another be let in."""
    steps = min(request.max_total_tokens - len(request.tokens) for request in requests) - 1
    steps = min(steps, closed_turns(scheduler)) if steps > 0 else 0
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
    """Drop, take and publish blocks in the order of the single steps: of each, for every request first what has left
    its windows and then what it takes, and after all of them the publishing. With two batches in flight it is the
    one before that is published."""
    blocks, size, steps = scheduler.blocks, scheduler.config.block_size, len(stretch.finished)
    windows = [window for window in blocks.windows if window is not None]
    overlapped = scheduler.depth - 1
    events: list[tuple[int, int, int, int, Request]] = []
    for order, (request, start) in enumerate(zip(requests, starts, strict=True)):
        events += [(step, 0, order, 1, request) for step in range(-start % size, steps, size)]
        for window in windows:  # the first step drops whatever there is, then one block at a time leaves
            events.append((0, 0, order, 0, request))
            events += [(step, 0, order, 0, request) for step in range((window - 1 - start) % size, steps, size)]
        if blocks.caching:
            full = (overlapped - start - 1) % size  # the step that ends with a full block
            events += [(step, 1, order, 0, request) for step in range(full, steps, size)]
    for step, publishes, order, takes, request in sorted(events, key=lambda event: event[:4]):
        position = starts[order] + step
        if publishes:
            blocks.publish(request, position + 1 - overlapped)
        elif takes:
            _take(scheduler, request, position + 1, step, stretch)
        else:
            blocks.drop_outside_windows(request, position)


def _take(scheduler: Scheduler, request: Request, reached: int, step: int, stretch: Stretch) -> None:
    held = [len(table) for table in request.blocks]
    if not scheduler.blocks.extend(request, reached):
        raise RuntimeError("a stretch of decodes ran out of blocks: it was taken for longer than they last")
    new = tuple(tuple(table[n:]) for table, n in zip(request.blocks, held, strict=True))
    stretch.new_blocks.append((step, request.id, new))
