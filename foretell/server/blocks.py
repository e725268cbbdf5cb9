"""An answer as a sequence of blocks, text and tool calls, while it grows.

``/v1/responses`` calls them output items, ``/v1/messages`` content blocks. Both stream the same three things about
each: it opens, it grows, it closes. Blocks follow each other; one closes before the next opens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from foretell.server.tools import ToolCallDelta


@dataclass(slots=True)
class Block:
    """One piece of an answer. A call's text is its arguments, JSON; its ``id`` and ``name`` are empty for text."""

    position: int
    kind: Literal["text", "call"]
    id: str = ""
    name: str = ""
    is_open: bool = True
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class BlockEvent(NamedTuple):
    verb: Literal["open", "grow", "close"]
    block: Block
    delta: str = ""


class BlockStream:
    """Deltas in, block events out. White space alone opens no block: it waits for what follows, and is dropped
    beside a tool call (models put line breaks between calls). An answer of nothing is one empty text block.

    ``max_calls`` bounds the calls; the one beyond it sets ``is_full`` and is not shown.
    """

    def __init__(self, max_calls: int | None = None) -> None:
        self.blocks: list[Block] = []
        self.max_calls = max_calls
        self.is_full = False
        self._waiting = ""  # white space that may yet belong to a text block
        self._call_index: int | None = None  # of the open call, as the deltas count

    def push(self, text: str, calls: Sequence[ToolCallDelta] = ()) -> list[BlockEvent]:
        """Text first, then the calls' growth."""
        events = list(self._push_text(text)) if text and not self.is_full else []
        for call in calls:
            if not self.is_full:
                events.extend(self._push_call(call))
        return events

    def finish(self) -> list[BlockEvent]:
        """Close what is open. Nothing may be pushed afterwards."""
        events = []
        if not self.blocks:
            events.append(self._open("text"))
            if self._waiting:
                events.append(self._grow(self._waiting))
        return [*events, *self._close()]

    def _push_text(self, text: str) -> Iterator[BlockEvent]:
        if self._open_block("text") is None:
            self._waiting += text
            if not self._waiting.strip():
                return
            text, self._waiting = self._waiting, ""
            yield from self._close()
            yield self._open("text")
        yield self._grow(text)

    def _push_call(self, call: ToolCallDelta) -> Iterator[BlockEvent]:
        if self._open_block("call") is None or call.index != self._call_index:
            if self.max_calls is not None and sum(b.kind == "call" for b in self.blocks) >= self.max_calls:
                self.is_full = True
                return
            self._waiting = ""
            yield from self._close()
            yield self._open("call", call.id or "", call.name or "")
            self._call_index = call.index
        if call.arguments:
            yield self._grow(call.arguments)

    def _open_block(self, kind: str) -> Block | None:
        last = self.blocks[-1] if self.blocks else None
        return last if last is not None and last.is_open and last.kind == kind else None

    def _open(self, kind: Literal["text", "call"], id: str = "", name: str = "") -> BlockEvent:
        self.blocks.append(Block(len(self.blocks), kind, id, name))
        return BlockEvent("open", self.blocks[-1])

    def _grow(self, delta: str) -> BlockEvent:
        self.blocks[-1].pieces.append(delta)
        return BlockEvent("grow", self.blocks[-1], delta)

    def _close(self) -> Iterator[BlockEvent]:
        if self.blocks and self.blocks[-1].is_open:
            self.blocks[-1].is_open = False
            yield BlockEvent("close", self.blocks[-1])
