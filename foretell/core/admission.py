"""Admission: may a waiting request join now, is there room for it, and how much of it is in the prefix cache?"""

from __future__ import annotations

from foretell.config import SchedulerConfig
from foretell.core.blocks import BlockManager
from foretell.core.request import Request
from foretell.core.waiting import AGED, WaitingQueue


class Admission:
    """Looks at the scheduler's running requests and its queue; ``blocks`` says what is free and what is cached."""

    def __init__(
        self, config: SchedulerConfig, blocks: BlockManager, waiting: WaitingQueue, running: list[Request]
    ) -> None:
        self.blocks = blocks
        self.waiting = waiting
        self.running = running
        self.max_num_seqs = config.max_num_seqs
        self.watermark_blocks = int(config.watermark * min(p.num_blocks for p in blocks.pools))
        self.several = config.admission_batch
        self.was_full = False  # all sequences were in use since the last admission
        self._free_since = 0  # the turn from which on some are not
        self.refusals = 0  # times that a request found no room
        self._refused: tuple[Request, int, int] | None = None  # who found no room; its hits, blocks.given_back then

    def has_free_sequences(self, turn: int) -> bool:
        """Prompts that join one by one cost a mixed step each; where those are dear, an engine that was full waits
        until several can join at once, or all that wait, though never longer than as many turns."""
        free = self.max_num_seqs - len(self.running)
        if free <= 0 or not self.was_full:
            return free > 0
        self._free_since = self._free_since or turn
        if self.opens_at(turn) > turn:
            return False
        self.was_full, self._free_since = False, 0
        return True

    def opens_at(self, turn: int) -> int:
        """The turn, not before ``turn``, from which an engine that was full lets requests in, if some sequences are
        free by then and no more become free meanwhile."""
        free = self.max_num_seqs - len(self.running)
        if self.was_full and self.running and free < min(self.several, len(self.waiting)):
            return max(turn, (self._free_since or turn) + self.several)
        return turn

    def skip_turns(self, turn: int) -> None:
        """Turns in which nobody could be let in are passed over, ``turn`` being the first of them."""
        if self.waiting and self.was_full and len(self.running) < self.max_num_seqs:
            self._free_since = self._free_since or turn

    def find_room(self, request: Request) -> int | None:
        """Tokens that cached blocks save the first in the queue, if there is room for the rest; else None. It has
        been set aside then if it shares a prefix that is being computed."""
        blocks = self.blocks
        if self._is_still_refused(request):
            return None
        cached = blocks.find_cached(request)
        awaited = None if request.key[0] == AGED else blocks.awaited(request, cached)
        if awaited is not None:  # computed once, then shared
            if self.waiting.num_aside < self.max_num_seqs:  # more of them could not run
                self.waiting.set_aside_first(awaited)
            return None
        spare = -blocks.shortage(request, cached, len(request.tokens), self._reserved_blocks())
        if spare < (self.watermark_blocks if self.running else 0):
            self._refused = (request, cached, blocks.given_back)
            self.refusals += 1
            return None
        self._refused = None
        return cached

    def _is_still_refused(self, request: Request) -> bool:
        """Who found no room is not searched for again until blocks have been given back, or the cache holds more of
        its prefix: a long prompt at the head of the queue would be searched at every turn."""
        if self._refused is None:
            return False
        refused, cached, given_back = self._refused
        same = refused is request and given_back == self.blocks.given_back
        return same and not self.blocks.may_hold_more(request, cached)

    def stays_refused(self, request: Request) -> bool:
        """Whether it finds no room, and will find none while the running requests only decode and none ends: no block
        is given back then, and none of theirs becomes part of its prefix."""
        if not self._is_still_refused(request) or self._refused is None:
            return False
        index, hashes = self._refused[1] // self.blocks.block_size, request.hashes
        if not self.blocks.caching or index >= len(hashes):
            return True
        for other in self.running:
            reach = min(index, len(other.hashes))  # chained hashes: equal here, equal so far
            if other.published <= index and (not reach or other.hashes[reach - 1] == hashes[reach - 1]):
                return False
        return True

    def _reserved_blocks(self) -> list[int]:
        """Blocks of each group that running prompts have still to take: promised, though not held yet."""
        prompts = [r for r in self.running if r.planned < r.prefill_end]
        return [
            sum(self.blocks.still_to_take(r, r.prefill_end, group) for r in prompts)
            for group in range(len(self.blocks.pools))
        ]
