"""The event sequence of a streamed ``/v1/responses`` answer, and the response object it adds up to.

    created, in_progress,
    (output_item.added, content_part.added, output_text.delta*, output_text.done, content_part.done, output_item.done
     | output_item.added, function_call_arguments.delta*, function_call_arguments.done, output_item.done)*,
    completed | incomplete | failed

The answer that is not streamed is the last event's response: one source, so the two cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from foretell.server.blocks import Block, BlockEvent, BlockStream

if TYPE_CHECKING:
    from foretell.server.tools import ToolCallDelta

Event = dict[str, Any]
Logprob = dict[str, Any]  # token, bytes, logprob, top_logprobs

COMPLETE_REASONS = ("stop", "tool_calls")


class ResponseEvents:
    """``response`` is the object as it begins: status "in_progress", no output. It is filled in place."""

    def __init__(self, response: dict[str, Any], *, max_calls: int | None = None) -> None:
        self.response = response
        self.stream = BlockStream(max_calls)
        self._sequence = 0
        self._items: list[dict[str, Any]] = []  # one for each block
        self._logprobs: list[Logprob] = []  # of the open text part
        self._unsent = 0  # the newest of them, waiting for a delta to ride on

    @property
    def has_started(self) -> bool:
        return self._sequence > 0

    def start(self) -> list[Event]:
        snapshot = {**self.response, "output": []}
        return [self._event(f"response.{name}", response=snapshot) for name in ("created", "in_progress")]

    def push(self, text: str, calls: Sequence[ToolCallDelta] = (), logprobs: Sequence[Logprob] = ()) -> list[Event]:
        self._logprobs.extend(logprobs)
        self._unsent += len(logprobs)
        return [event for block_event in self.stream.push(text, calls) for event in self._events(block_event)]

    def finish(self, finish_reason: str, usage: dict[str, Any]) -> list[Event]:
        """The end of an answer that came to one: complete, or cut at its length."""
        status = "completed" if finish_reason in COMPLETE_REASONS else "incomplete"
        events = [event for block_event in self.stream.finish() for event in self._events(block_event, status)]
        self.response.update(status=status, output=self._items, usage=usage)
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        else:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, code: str, message: str) -> list[Event]:
        """The end of an answer that broke off; what was open stays so. ``code`` is one of OpenAI's."""
        finished = [item for item in self._items if item["status"] != "in_progress"]
        self.response.update(status="failed", output=finished, error={"code": code, "message": message})
        return [self._event("response.failed", response=self.response)]

    # -- blocks to events ---------------------------------------------------------------------------

    def _event(self, type: str, **fields: Any) -> Event:
        event = {"type": type, **fields, "sequence_number": self._sequence}
        self._sequence += 1
        return event

    def _events(self, event: BlockEvent, status: str = "completed") -> list[Event]:
        block = event.block
        if event.verb == "open":
            return self._open_text(block) if block.kind == "text" else self._open_call(block)
        if event.verb == "grow":
            return [
                self._grow_text(block, event.delta) if block.kind == "text" else self._grow_call(block, event.delta)
            ]
        item = self._items[block.position]
        item["status"] = status
        done = self._close_text(block, item) if block.kind == "text" else self._close_call(block, item)
        return [*done, self._event("response.output_item.done", output_index=block.position, item=item)]

    def _add_item(self, block: Block, item: dict[str, Any]) -> Event:
        self._items.append(item)
        # a copy: the item goes on changing, the event does not
        return self._event("response.output_item.added", output_index=block.position, item=dict(item))

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._items[block.position]["id"], "output_index": block.position}
        return place if block.kind == "call" else {**place, "content_index": 0}

    def _open_text(self, block: Block) -> list[Event]:
        item = {"type": "message", "id": new_id("msg"), "status": "in_progress", "role": "assistant", "content": []}
        added = self._add_item(block, item)
        return [added, self._event("response.content_part.added", **self._place(block), part=text_part("", []))]

    def _grow_text(self, block: Block, delta: str) -> Event:
        logprobs = [without_bytes(entry) for entry in self._logprobs[len(self._logprobs) - self._unsent :]]
        self._unsent = 0
        return self._event("response.output_text.delta", **self._place(block), delta=delta, logprobs=logprobs)

    def _close_text(self, block: Block, item: dict[str, Any]) -> list[Event]:
        text, logprobs, place = block.text, self._logprobs, self._place(block)
        self._logprobs, self._unsent = [], 0
        part = text_part(text, logprobs)
        item["content"] = [part]
        short = [without_bytes(entry) for entry in logprobs]
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=short),
            self._event("response.content_part.done", **place, part=part),
        ]

    def _open_call(self, block: Block) -> list[Event]:
        item = {"type": "function_call", "id": new_id("fc"), "status": "in_progress"}
        return [self._add_item(block, {**item, "call_id": block.id, "name": block.name, "arguments": ""})]

    def _grow_call(self, block: Block, delta: str) -> Event:
        return self._event("response.function_call_arguments.delta", **self._place(block), delta=delta)

    def _close_call(self, block: Block, item: dict[str, Any]) -> list[Event]:
        item["arguments"] = block.text
        self._logprobs, self._unsent = [], 0
        return [
            self._event("response.function_call_arguments.done", **self._place(block), arguments=item["arguments"])
        ]


def new_id(prefix: str) -> str:
    """An id of ours: random, so that nobody can name another's."""
    return f"{prefix}_{uuid4().hex}"


def text_part(text: str, logprobs: list[Logprob]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def without_bytes(entry: Logprob) -> Logprob:
    """As the delta events spell it: the text alone."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}
