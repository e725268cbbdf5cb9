"""The events of /v1/messages: well formed for any cut of the answer, and what the anthropic client makes of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.server.conversation import read_arguments
from foretell.server.messages_events import MessageEvents
from tests.server.answers import SCRIPTS, expected, pushes
from tests.server.strict import one_of, strictly

USAGE = {
    "input_tokens": 3,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 2,
    "output_tokens": 1,
}
LETTERS = {
    "message_start": "M",
    "ping": "i",
    "content_block_start": "S",
    "content_block_delta": "d",
    "content_block_stop": "E",
    "message_delta": "D",
    "message_stop": "X",
}
WHOLE = re.compile(r"Mi(Sd*E)+DX")


def machine() -> MessageEvents:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "content": []}
    return MessageEvents({**message, "stop_reason": None, "stop_sequence": None, "usage": None})


def whole(parts: list[Any], reason: str = "end_turn") -> tuple[MessageEvents, list[dict[str, Any]]]:
    made = machine()
    events = made.start(USAGE)
    for text, calls in parts:
        events += made.push(text, calls)
    events += made.finish(reason, None, {**USAGE, "output_tokens": 9})
    return made, events


@settings(deadline=None, max_examples=50)
@given(data=st.data(), script=SCRIPTS)
def test_any_cut_of_an_answer_makes_the_same_well_formed_stream(data: Any, script: Any) -> None:
    made, events = whole(data.draw(pushes(script)))
    assert WHOLE.fullmatch("".join(LETTERS[event["type"]] for event in events))
    for event in events:
        if event["type"] != "ping":
            one_of(RawMessageStreamEvent, event)
    final = strictly(Message, made.message)
    assert [_shown(block) for block in final.content] == [
        block if block[0] == "text" else (block[0], block[1], json.loads(block[2] or "{}"))
        for block in expected(script)
    ]
    assert _accumulated(events).to_dict(exclude_none=True) == final.to_dict(exclude_none=True)


def _shown(block: Any) -> tuple[Any, ...]:
    return ("text", block.text) if block.type == "text" else ("call", block.name, block.input)


def _accumulated(events: list[dict[str, Any]]) -> Message:
    """The client's own sum of the events."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            one = one_of(RawMessageStreamEvent, event)
            snapshot = accumulate_event(event=one, current_snapshot=snapshot, json_bufs=buffers)
    made: Message = strictly(Message, snapshot.to_dict())
    return made


def test_indices_count_blocks_and_deltas_belong_to_the_open_one() -> None:
    from foretell.server.chat import ToolCallDelta

    parts = [("Let me", ()), (" see.\n", (ToolCallDelta(0, "c0", "f", '{"a"'),))]
    parts += [("", (ToolCallDelta(0, arguments=": 1}"),)), ("\n", ()), ("", (ToolCallDelta(1, "c1", "g", "{}"),))]
    _, events = whole(parts, "tool_use")
    assert [event["index"] for event in events if "index" in event] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 9
    assert events[0]["message"]["usage"]["output_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ("", {}),
        ('{"city": "Par', {}),
        ('{"city": "Paris", "days": 3', {"city": "Paris", "days": 3}),
        ('{"city": "Paris", "da', {"city": "Paris"}),
        ('{"a": [1, 2', {"a": [1, 2]}),
        ("not json", {}),
    ],
)
def test_arguments_that_were_cut_are_read_as_far_as_they_go(arguments: str, read: dict[str, Any]) -> None:
    from jiter import from_json

    assert read_arguments(arguments) == read
    if arguments and arguments != "not json":  # as the client does with a stream
        assert from_json(arguments.encode(), partial_mode=True) == read
