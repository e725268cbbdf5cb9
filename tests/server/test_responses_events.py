"""The events of /v1/responses: well formed for any cut of the answer, and what the openai client makes of them."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai._types import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent

from foretell.server.blocks import BlockStream
from foretell.server.chat import ToolCallDelta
from foretell.server.protocol.responses import ResponsesRequest
from foretell.server.responses_events import ResponseEvents
from foretell.server.responses_request import begin_response
from tests.server.answers import SCRIPTS, expected, pushes
from tests.server.strict import one_of, strictly

USAGE = {
    "input_tokens": 3,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 7,
}
LETTERS = {
    "response.created": "C",
    "response.in_progress": "I",
    "response.output_item.added": "A",
    "response.content_part.added": "P",
    "response.output_text.delta": "d",
    "response.output_text.done": "t",
    "response.content_part.done": "p",
    "response.output_item.done": "O",
    "response.function_call_arguments.delta": "a",
    "response.function_call_arguments.done": "f",
    "response.completed": "X",
    "response.incomplete": "Y",
    "response.failed": "Z",
}
WHOLE = re.compile(r"CI(APd*tpO|Aa*fO)+[XY]")
# what a broken stream looks like: any beginning of a whole one, then failed
BROKEN = re.compile(r"CI(APd*tpO|Aa*fO)*(APd*|Aa*)?Z")


def machine(**fields: Any) -> ResponseEvents:
    return ResponseEvents(begin_response(ResponsesRequest(input="hi", **fields), "tiny"))


def letters(events: list[dict[str, Any]]) -> str:
    return "".join(LETTERS[event["type"]] for event in events)


def output_of(response: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("text", item["content"][0]["text"])
        if item["type"] == "message"
        else ("call", item["name"], item["arguments"])
        for item in response["output"]
    ]


@settings(deadline=None, max_examples=50)
@given(data=st.data(), script=SCRIPTS, reason=st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_cut_of_an_answer_makes_the_same_well_formed_stream(data: Any, script: Any, reason: str) -> None:
    made = machine()
    events = made.start()
    for text, calls in data.draw(pushes(script)):
        events += made.push(text, calls)
    events += made.finish(reason, USAGE)

    assert WHOLE.fullmatch(letters(events))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert output_of(made.response) == expected(script)
    for event in events:
        one_of(ResponseStreamEvent, event)
    _deltas_add_up(events)
    _client_agrees(events)
    statuses = [item["status"] for item in made.response["output"]]
    assert statuses[:-1] == ["completed"] * (len(statuses) - 1)
    assert statuses[-1] == made.response["status"] == ("incomplete" if reason == "length" else "completed")


def _deltas_add_up(events: list[dict[str, Any]]) -> None:
    """Each item's deltas, joined, are what its done events and the final response say."""
    grown: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            grown[event["output_index"]] = grown.get(event["output_index"], "") + event["delta"]
        elif event["type"] == "response.output_text.done":
            assert event["text"] == grown.get(event["output_index"], "")
        elif event["type"] == "response.function_call_arguments.done":
            assert event["arguments"] == grown.get(event["output_index"], "")
    final = events[-1]["response"]["output"]
    for index, item in enumerate(final):
        said = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
        assert said == grown.get(index, "")


def _client_agrees(events: list[dict[str, Any]]) -> None:
    """The client's own accumulation of the deltas ends where the final response does."""
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in events:
        state.handle_event(construct_type(type_=ResponseStreamEvent, value=event))
    final = strictly(Response, events[-1]["response"])
    grown = state._ResponseStreamState__current_snapshot.output
    assert [item.type for item in grown] == [item.type for item in final.output]
    for mine, theirs in zip(final.output, grown, strict=True):
        if mine.type == "message":
            assert mine.content[0].text == theirs.content[0].text
        else:
            assert (mine.call_id, mine.name, mine.arguments) == (theirs.call_id, theirs.name, theirs.arguments)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), script=SCRIPTS)
def test_a_stream_that_breaks_off_ends_in_failed(data: Any, script: Any) -> None:
    made = machine()
    events = made.start()
    parts = data.draw(pushes(script))
    for text, calls in parts[: data.draw(st.integers(0, len(parts)))]:
        events += made.push(text, calls)
    events += made.fail("server_error", "the engine was lost")
    assert BROKEN.fullmatch(letters(events))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = one_of(ResponseStreamEvent, events[-1]).response
    assert final.status == "failed"
    assert final.error.message == "the engine was lost"
    assert all(item.status == "completed" for item in final.output)


def test_what_was_sent_does_not_change_afterwards() -> None:
    made = machine()
    events = [*made.start(), *made.push("Hel"), *made.push("lo")]
    early = [str(event) for event in events]
    made.push("", (ToolCallDelta(0, "c", "f", "{}"),))
    made.finish("stop", USAGE)
    assert [str(event) for event in events] == early


def test_logprobs_ride_on_the_deltas_and_end_in_the_part() -> None:
    def entry(token: str) -> dict[str, Any]:
        top = [{"token": token, "bytes": list(token.encode()), "logprob": -0.5}]
        return {**top[0], "top_logprobs": top}

    made = machine(top_logprobs=1)
    events = made.start()
    events += made.push("", (), [entry("H")])  # half a character: no text yet
    events += made.push("He", (), [entry("e")])
    events += made.push("y", (), [entry("y")])
    events += made.push("", (), [entry("")])  # the end token
    events += made.finish("stop", USAGE)
    for event in events:
        one_of(ResponseStreamEvent, event)
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [[one["token"] for one in some] for some in deltas] == [["H", "e"], ["y"]]
    part = made.response["output"][0]["content"][0]
    assert [one["token"] for one in part["logprobs"]] == ["H", "e", "y", ""]
    assert part["logprobs"][0]["bytes"] == [72]


def test_a_call_beyond_the_allowed_is_not_shown() -> None:
    stream = BlockStream(max_calls=1)
    stream.push("", (ToolCallDelta(0, "a", "f", "{}"),))
    assert not stream.is_full
    assert stream.push("", (ToolCallDelta(1, "b", "g", "{}"),)) == []
    assert stream.is_full
    assert stream.push("more") == []
    assert [block.name for block in stream.blocks] == ["f"]
