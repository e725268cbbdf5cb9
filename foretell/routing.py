"""Which of several equal engines gets a request: the one that has its beginning cached, unless that is too busy.

Pure decisions: the server's replicas and the planner's simulated ones are routed by the same lines.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foretell.prompts import Prompt

PIECE_TOKENS, PIECE_CHARS = 64, 256  # a beginning is remembered piece by piece, each with all before it
MAX_PIECES = 64
REMEMBERED = 32_768  # pieces per replica
AHEAD = 4  # unfinished outputs that the best-cached replica may have more than the idlest


class Beginnings:
    """Which beginnings of prompts one replica has seen of late, the least recent forgotten first."""

    def __init__(self, capacity: int = REMEMBERED) -> None:
        self.capacity = capacity
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def matching(self, pieces: Sequence[bytes]) -> int:
        """How many of the pieces, from the first on."""
        return next((i for i, piece in enumerate(pieces) if piece not in self._seen), len(pieces))

    def note(self, pieces: Sequence[bytes]) -> None:
        for piece in pieces:
            self._seen[piece] = None
            self._seen.move_to_end(piece)
        while len(self._seen) > self.capacity:
            self._seen.popitem(last=False)

    def clear(self) -> None:
        self._seen.clear()


def pieces_of(prompt: Prompt) -> list[bytes]:
    """Chained hashes of the prompt's full pieces: equal beginnings give equal hashes."""
    return list(_pieces(prompt))


def _pieces(prompt: Prompt) -> Iterator[bytes]:
    text = isinstance(prompt, str)
    size = PIECE_CHARS if text else PIECE_TOKENS
    digest = b"text" if text else b"ids"
    for at in range(0, min(len(prompt) // size, MAX_PIECES) * size, size):
        part = prompt[at : at + size]
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else array("q", part).tobytes()
        digest = blake2b(digest + data, digest_size=12).digest()
        yield digest


def preference(unfinished: Sequence[int], matching: Callable[[int], int], turn: int) -> list[int]:
    """Replicas, best first: the longest cached beginning among those that are not far busier than the idlest; then
    the idlest; in turn where all is equal. ``matching(i)``: pieces that replica i has seen."""
    idlest, size = min(unfinished), len(unfinished)

    def rank(index: int) -> tuple[int, int, int]:
        busy = unfinished[index]
        return -(matching(index) if busy <= idlest + AHEAD else 0), busy, (index - turn) % size

    return sorted(range(size), key=rank)
