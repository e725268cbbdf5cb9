"""KV blocks: who holds which, what may be shared, what is evicted first. Ids only; workers hold the tensors."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from foretell.core.request import Request

DROPPED = -1  # stands in a block table for a block that fell out of the group's window


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, num_tokens: int) -> None:
    """Add the hashes of full blocks, each chained to the last, until the first ``num_tokens`` tokens have theirs."""
    for start in range(len(hashes) * block_size, num_tokens // block_size * block_size, block_size):
        parent = hashes[-1] if hashes else b""
        content = array("q", tokens[start : start + block_size]).tobytes()
        hashes.append(blake2b(parent + content, digest_size=16).digest())


class BlockPool:
    """Reference-counted blocks of one KV group. Free blocks keep their contents, and their hash, until
    they are taken: the free list is ordered from least to most recently used, and is evicted from the front."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.cached: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.evictions = 0  # cached blocks that were taken for new contents

    @property
    def num_free(self) -> int:
        return len(self.free)

    def take(self, count: int) -> list[int]:
        """``count`` blocks for new contents; the caller has checked that so many are free."""
        taken, pop, references, hash_of = [], self.free.popitem, self.references, self.hash_of
        for _ in range(count):
            block, _ = pop(last=False)
            old = hash_of[block]
            if old is not None:
                del self.cached[old]
                hash_of[block] = None
                self.evictions += 1
            references[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        if self.references[block] == 0:
            del self.free[block]
        self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give back one reference to each; those that are not there (``DROPPED``) are passed over."""
        references, free, hash_of = self.references, self.free, self.hash_of
        for block in blocks:
            if block == DROPPED:
                continue
            left = references[block] - 1
            if left < 0:
                raise RuntimeError(f"KV block {block} released twice")
            references[block] = left
            if not left:
                free[block] = None
                if hash_of[block] is None:  # nothing to find in it again: first to be reused
                    free.move_to_end(block, last=False)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Let others find this full block. The first holder of a hash stays; twins stay private."""
        if block_hash not in self.cached and self.hash_of[block] is None:
            self.cached[block_hash] = block
            self.hash_of[block] = block_hash


class BlockManager:
    """Block tables of all requests over one pool per KV group (full attention, each sliding window)."""

    def __init__(
        self, num_blocks: Sequence[int], windows: Sequence[int | None], block_size: int, *, caching: bool
    ) -> None:
        self.block_size = block_size
        self.windows = tuple(windows)
        self.pools = [BlockPool(n) for n in num_blocks]
        self.caching = caching
        self.given_back = 0  # times that blocks were: nothing else makes room
        self.expected: dict[bytes, int] = {}  # hash of a block → running requests that have yet to compute it

    @property
    def max_tokens_per_request(self) -> int:
        """Longest sequence that fits when it has the cache to itself."""
        full = [p.num_blocks for p, w in zip(self.pools, self.windows, strict=True) if w is None]
        return min(full) * self.block_size if full else 2**62

    @property
    def max_chunk_tokens(self) -> int:
        """Longest chunk whose window and own tokens fit a sliding group's pool; < 1 when nothing fits."""
        room = [
            (p.num_blocks - 1) * self.block_size - (w - 1)
            for p, w in zip(self.pools, self.windows, strict=True)
            if w is not None
        ]
        return min(room, default=2**62)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- prefix cache -------------------------------------------------------------------------------

    def update_hashes(self, request: Request, num_tokens: int) -> None:
        """Hash the full blocks among the first ``num_tokens`` known tokens, each chained to the last."""
        extend_hashes(request.hashes, request.tokens, self.block_size, num_tokens)

    def find_cached(self, request: Request) -> int:
        """Tokens of the longest usable cached prefix: always whole blocks, and never the last known token,
        whose logits are still wanted. A sliding group needs only the blocks its window reaches back to."""
        if not self.caching:
            return 0
        self.update_hashes(request, len(request.tokens))
        if request.params.reads_every_position:
            return 0  # it computes all of it, and others may wait for what it computes
        hashes = request.hashes
        count = min(len(hashes), (len(request.tokens) - 1) // self.block_size)
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is None:
                count = next((i for i in range(count) if hashes[i] not in pool.cached), count)
        while count and not self._windows_cached(hashes, count):
            count -= 1
        return count * self.block_size

    def may_hold_more(self, request: Request, cached: int) -> bool:
        """Whether a search might by now find more than the ``cached`` tokens that the last one found."""
        if any(window is not None for window in self.windows):
            return True  # a hit depends on many blocks
        index = cached // self.block_size
        return index < len(request.hashes) and request.hashes[index] in self.pools[0].cached

    def awaited(self, request: Request, cached: int) -> bytes | None:
        """The last of the blocks after a hit of ``cached`` tokens that running requests are about to compute."""
        last, index = None, cached // self.block_size
        if self.expected and self.caching and not request.params.reads_every_position:
            end = min(len(request.hashes), (len(request.tokens) - 1) // self.block_size)
            while index < end and request.hashes[index] in self.expected:
                last, index = request.hashes[index], index + 1
        return last

    def _windows_cached(self, hashes: list[bytes], count: int) -> bool:
        for pool, window in zip(self.pools, self.windows, strict=True):
            if window is not None:
                first = self._first_needed(count * self.block_size, window)
                if any(hashes[i] not in pool.cached for i in range(first, count)):
                    return False
        return True

    def _first_needed(self, position: int, window: int) -> int:
        """First logical block that a query at ``position`` can still see: keys > position - window."""
        return max(0, position - window + 1) // self.block_size

    # -- holding blocks -----------------------------------------------------------------------------

    def shortage(self, request: Request, cached: int, num_tokens: int, reserved: Sequence[int]) -> int:
        """Blocks by which the free ones, less those ``reserved`` in each group, fall short of ``num_tokens`` after
        a hit of ``cached`` tokens, in the tightest group; negative: so many are left over. Counts cached blocks
        that are free now as taken."""
        worst = -(2**62)
        hits = cached // self.block_size
        for pool, window, promised in zip(self.pools, self.windows, reserved, strict=True):
            first = 0 if window is None else self._first_needed(cached, window)
            revived = sum(1 for h in request.hashes[first:hits] if not pool.references[pool.cached[h]])
            wanted = self.blocks_for(num_tokens) - hits + revived
            if window is not None:  # it gives blocks back as it goes on
                wanted = min(wanted, self.blocks_for(window) + 1)
            worst = max(worst, wanted + promised - pool.num_free)
        return worst

    def still_to_take(self, request: Request, num_tokens: int, group: int) -> int:
        """Blocks of a group that a request needs beyond those it holds, on its way to ``num_tokens``."""
        held, window = len(request.blocks[group]), self.windows[group]
        wanted = self.blocks_for(num_tokens) - held
        if window is not None:
            live = held - request.releasable_from[group]
            wanted = min(wanted, max(0, self.blocks_for(window) + 1 - live))
        return wanted

    def fit_windows(self, request: Request, start: int, length: int, *, spare: int) -> int:
        """``length``, or as much of a chunk from ``start`` as the sliding groups' free blocks but ``spare`` hold:
        better a short chunk than to wait, or to preempt, for what its own window gives back soon. At least 1."""
        for table, pool, window in zip(request.blocks, self.pools, self.windows, strict=True):
            if window is not None:
                room = len(table) + max(0, pool.num_free - spare)
                length = min(length, room * self.block_size - start)
        return max(1, length)

    def attach(self, request: Request, cached: int) -> None:
        """Start the block tables with the shared blocks of a hit of ``cached`` tokens: no copy."""
        hits = cached // self.block_size
        request.blocks = []
        request.releasable_from = []
        for pool, window in zip(self.pools, self.windows, strict=True):
            first = 0 if window is None else self._first_needed(cached, window)
            table = [DROPPED] * first
            for block_hash in request.hashes[first:hits]:
                block = pool.cached[block_hash]
                pool.share(block)
                table.append(block)
            request.blocks.append(table)
            request.releasable_from.append(first)
        request.planned = request.cached_tokens = cached
        request.published = hits
        request.expected_end = len(request.hashes)
        for block_hash in request.hashes[hits:]:
            self.expected[block_hash] = self.expected.get(block_hash, 0) + 1

    def _settle(self, request: Request, end: int) -> None:
        """Its blocks from ``published`` to ``end`` are computed, or never will be by this request."""
        for block_hash in request.hashes[request.published : min(end, request.expected_end)]:
            left = self.expected[block_hash] - 1
            if left:
                self.expected[block_hash] = left
            else:
                del self.expected[block_hash]

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Blocks for the first ``num_tokens`` tokens, in every group or in none (False)."""
        count = -(-num_tokens // self.block_size)
        for table, pool in zip(request.blocks, self.pools, strict=True):
            if count - len(table) > len(pool.free):
                return False
        for table, pool in zip(request.blocks, self.pools, strict=True):
            if count > len(table):
                table.extend(pool.take(count - len(table)))
        return True

    def drop_outside_windows(self, request: Request, next_position: int) -> None:
        """Give back blocks that no query from ``next_position`` on can see. Batches run in order, so a
        batch in flight that still reads such a block is done before a later one overwrites it."""
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            table, start = request.blocks[group], request.releasable_from[group]
            end = min(self._first_needed(next_position, window), len(table))
            self.given_back += end > start
            self.pools[group].release(table[start:end])
            table[start:end] = [DROPPED] * max(0, end - start)
            request.releasable_from[group] = max(start, end)

    def publish(self, request: Request, num_computed: int) -> None:
        """Put hashes of computed full blocks of accepted tokens in the cache."""
        if not self.caching:
            return
        full = min(num_computed, len(request.tokens)) // self.block_size
        if full <= request.published:
            return
        self.update_hashes(request, full * self.block_size)
        self._settle(request, full)
        for table, pool in zip(request.blocks, self.pools, strict=True):
            for i in range(request.published, full):
                if table[i] != DROPPED:
                    pool.publish(table[i], request.hashes[i])
        request.published = full

    def release(self, request: Request) -> None:
        """Give everything back, the end of the sequence first: beginnings are what others share."""
        self.given_back += 1
        self._settle(request, request.expected_end)
        request.expected_end = 0
        for table, pool in zip(request.blocks, self.pools, strict=False):  # no tables: it holds nothing
            pool.release(reversed(table))
        request.blocks = []
        request.releasable_from = []
        request.published = 0

    @property
    def usage(self) -> float:
        """Share of blocks held by requests, in the fullest group."""
        return max(1 - p.num_free / p.num_blocks for p in self.pools)
