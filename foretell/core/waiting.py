"""The waiting queue: who is admitted next. Priorities, then arrival; whoever waited too long goes before all."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container

from foretell.core.request import Request, State

AGED = -(2**62)  # the priority of a request that has waited too long


class WaitingQueue:
    """Requests in the order of their keys (priority, order of arrival). Ages are counted in turns: a request that
    waited ``starvation_turns`` of them is aged, for good. Entries of requests that ended or were promoted
    meanwhile stay until they come up, or until they outnumber the others. Those set aside have none."""

    def __init__(self, starvation_turns: int) -> None:
        self.starvation_turns = starvation_turns
        self._count = 0
        self._by_key: list[tuple[tuple[int, int], int, Request]] = []  # a heap
        self._by_age: deque[tuple[int, Request]] = deque()  # (turn it began to wait, request), oldest first
        self._aside: dict[bytes, list[Request]] = {}  # by the hash of the block that they are waiting for
        self.num_aside = 0

    def __len__(self) -> int:
        return self._count

    @property
    def num_entries(self) -> int:
        """Entries held, stale ones included: bounded by a small multiple of the requests that wait."""
        return max(len(self._by_key), len(self._by_age))

    def push(self, request: Request, turn: int) -> None:
        """Queue a request that begins to wait in this turn."""
        request.state = State.WAITING
        request.last_turn = turn
        self._count += 1
        self._by_age.append((turn, request))
        self._push_entry(request)

    def remove(self) -> None:
        """One of the requests has ended; the caller changes its state, by which its entries are known as stale."""
        self._count -= 1

    def first(self, turn: int) -> Request | None:
        """Who is next, as of this turn. It stays in the queue."""
        self._promote_aged(turn)
        while self._by_key:
            key, _, request = self._by_key[0]
            if request.state is State.WAITING and key == request.key:
                return request
            heapq.heappop(self._by_key)
        return None

    def pop_first(self) -> None:
        """Take out the one that ``first`` gave."""
        heapq.heappop(self._by_key)
        self._count -= 1

    def set_aside_first(self, block_hash: bytes) -> None:
        """Pass over the one that ``first`` gave until this block is no longer expected, or it has aged."""
        _, _, request = heapq.heappop(self._by_key)
        self._aside.setdefault(block_hash, []).append(request)
        self.num_aside += 1

    def recall(self, expected: Container[bytes]) -> None:
        """Take back those whose blocks are not expected any more: computed, or given up."""
        for block_hash in [h for h in self._aside if h not in expected]:
            requests = self._aside.pop(block_hash)
            self.num_aside -= len(requests)
            for request in requests:
                if request.state is State.WAITING:
                    self._push_entry(request)

    def ages_at(self) -> int | None:
        """The turn in which the next request will be aged; None if nobody waits who is not."""
        while self._by_age:
            since, request = self._by_age[0]
            if request.state is State.WAITING and request.last_turn == since:
                return since + self.starvation_turns
            self._by_age.popleft()
        return None

    def _promote_aged(self, turn: int) -> None:
        while self._by_age:
            since, request = self._by_age[0]
            waits = request.state is State.WAITING and request.last_turn == since
            if waits and turn - since < self.starvation_turns:
                return
            self._by_age.popleft()
            if waits and request.key[0] != AGED:
                request.key = (AGED, request.order)
                self._push_entry(request)

    def _push_entry(self, request: Request) -> None:
        heapq.heappush(self._by_key, (request.key, request.order, request))
        if self.num_entries > 4 * self._count + 64:
            self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        """Under a lasting overload none of them comes up. The entries of the request that is being admitted, which
        counts as running already, stay."""
        left = State.FINISHED
        self._by_key = [e for e in self._by_key if e[2].state is not left and e[0] == e[2].key]
        heapq.heapify(self._by_key)
        self._by_age = deque(e for e in self._by_age if e[1].state is not left and e[0] == e[1].last_turn)
