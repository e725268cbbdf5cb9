"""The event sequence of a streamed ``/v1/messages`` answer, and the message it adds up to.

    message_start, ping,
    (content_block_start, content_block_delta*, content_block_stop)*,
    message_delta, message_stop | error

The message that is not streamed comes out of the same object, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from foretell.server.blocks import Block, BlockEvent, BlockStream
from foretell.server.conversation import read_arguments

if TYPE_CHECKING:
    from foretell.server.tools import ToolCallDelta

Event = dict[str, Any]

PING: Event = {"type": "ping"}


class MessageEvents:
    """``message`` is the object as it begins: no content, no stop reason. It is filled in place."""

    def __init__(self, message: dict[str, Any], *, max_calls: int | None = None) -> None:
        self.message = message
        self.stream = BlockStream(max_calls)
        self.has_started = False

    def start(self, usage: dict[str, Any]) -> list[Event]:
        self.has_started = True
        return [{"type": "message_start", "message": {**self.message, "content": [], "usage": usage}}, PING]

    def push(self, text: str, calls: Sequence[ToolCallDelta] = ()) -> list[Event]:
        return [_event(block_event) for block_event in self.stream.push(text, calls)]

    def finish(self, stop_reason: str, stop_sequence: str | None, usage: dict[str, Any]) -> list[Event]:
        """``stop_reason`` is one of Anthropic's; ``usage`` counts the whole message."""
        events = [_event(block_event) for block_event in self.stream.finish()]
        end = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        self.message.update(content=[_content(block) for block in self.stream.blocks], usage=usage, **end)
        return [
            *events,
            {"type": "message_delta", "delta": end, "usage": _delta_usage(usage)},
            {"type": "message_stop"},
        ]


def _event(event: BlockEvent) -> Event:
    block = event.block
    if event.verb == "close":
        return {"type": "content_block_stop", "index": block.position}
    if event.verb == "open":
        start = {"type": "content_block_start", "index": block.position}
        if block.kind == "text":
            return {**start, "content_block": {"type": "text", "text": ""}}
        return {**start, "content_block": {"type": "tool_use", "id": block.id, "name": block.name, "input": {}}}
    if block.kind == "text":
        delta = {"type": "text_delta", "text": event.delta}
    else:
        delta = {"type": "input_json_delta", "partial_json": event.delta}
    return {"type": "content_block_delta", "index": block.position, "delta": delta}


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": read_arguments(block.text)}


def _delta_usage(usage: dict[str, Any]) -> dict[str, Any]:
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
    return {name: usage[name] for name in names}
