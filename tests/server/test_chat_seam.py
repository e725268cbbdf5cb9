"""chat.py: what every chat route stands on."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from foretell.core.params import SamplingParams
from foretell.errors import InvalidRequestError
from foretell.server.chat import ChatRequest, chat_deltas, prompt_ids
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import run

GREEDY = SamplingParams(temperature=0, max_tokens=12)
HELLO = [{"role": "user", "content": "Hello"}]


def collect(engine: LocalTextEngine, request: ChatRequest) -> list[Any]:
    async def go() -> list[Any]:
        return [delta async for delta in chat_deltas(engine, request)]

    return run(go())


def test_prompt_ids_are_the_rendered_template(tiny: LocalTextEngine) -> None:
    assert tiny.tokenizer is not None
    ids = prompt_ids(tiny, ChatRequest(HELLO, GREEDY))
    assert tiny.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_last_turn_can_be_continued(tiny: LocalTextEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Hello to"}]
    request = ChatRequest(messages, GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert tiny.tokenizer is not None
    text = tiny.tokenizer.decode(prompt_ids(tiny, request), skip_special_tokens=False)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHello to"
    with pytest.raises(InvalidRequestError, match="one turn or the other"):
        prompt_ids(tiny, ChatRequest(messages, GREEDY, continue_final_message=True))


def test_deltas_add_up_to_what_the_engine_says(tiny: LocalTextEngine) -> None:
    request = ChatRequest(HELLO, GREEDY)
    deltas = collect(tiny, request)
    direct = run(tiny.llm.generate(prompt_ids(tiny, request), GREEDY))
    assert "".join(d.text for d in deltas) == direct.outputs[0].text
    assert [d.finish_reason for d in deltas if d.finish_reason] == [direct.outputs[0].finish_reason]
    assert deltas[-1].update.output.prompt_token_ids == prompt_ids(tiny, request)


def test_a_long_conversation_is_refused_by_its_length(tiny: LocalTextEngine) -> None:
    request = ChatRequest([{"role": "user", "content": "x" * 200}], GREEDY, max_prompt_chars=100)
    with pytest.raises(InvalidRequestError, match="characters and 100 are allowed"):
        prompt_ids(tiny, request)


@pytest.mark.parametrize(
    "kwargs",
    [{"messages": []}, {"tools": 1}, {"chat_template": "{{ 7*7 }}"}, {"eos_token": "x"}, {"__class__": 1},
     {"self": 1}, {"x": {"deep": 1}}, {"x": "y" * 5000}, {"X": 1}],
)  # fmt: skip
def test_template_kwargs_set_plain_switches_only(tiny: LocalTextEngine, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        prompt_ids(tiny, ChatRequest(HELLO, GREEDY, template_kwargs=kwargs))
    prompt_ids(tiny, ChatRequest(HELLO, GREEDY, template_kwargs={"enable_thinking": False}))


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]


@pytest.mark.parametrize("choice", ["required", {"name": "weather"}])
def test_a_required_tool_call_always_parses(tiny: LocalTextEngine, choice: Any) -> None:
    """The model has random weights: that it calls a tool, and rightly, is the grammar's doing."""
    for seed in range(3):
        params = SamplingParams(temperature=1.0, max_tokens=400, seed=seed)
        request = ChatRequest(HELLO, params, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
        deltas = collect(tiny, request)
        calls = [call for delta in deltas for call in delta.tool_calls]
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["tool_calls"]
        assert "".join(d.text for d in deltas) == ""
        assert [call.index for call in calls] == [0] * len(calls)
        assert [call.name is not None for call in calls] == [call.id is not None for call in calls]
        assert sum(call.name is not None for call in calls) == 1
        function = next(t["function"] for t in TOOLS if t["function"]["name"] == calls[0].name)
        jsonschema.validate(
            json.loads("".join(call.arguments for call in calls)), function.get("parameters", {"maxProperties": 0})
        )


def test_without_a_call_the_answer_is_text(tiny: LocalTextEngine) -> None:
    request = ChatRequest(HELLO, GREEDY, tools=TOOLS)
    deltas = collect(tiny, request)
    assert tiny.tokenizer is not None
    assert "".join(d.text for d in deltas) == deltas[-1].update.output.outputs[0].text
    assert not any(d.tool_calls for d in deltas)
