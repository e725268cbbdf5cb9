"""Tools through /v1/responses and /v1/messages with the official clients: auto, required, by name, and back again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response

from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from foretell.server.tools import tool_parser_for
from tests.server.live import serving
from tests.server.scripted import ScriptedEngine
from tests.server.strict import strictly
from tests.server.tiny import start_tiny, write_model

# how models of the Hermes and Qwen families are told of tools, and how they call them
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>"
    'answer with <tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}'
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": [1, 2]}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}
CLAUDE_TOOL = {"name": "get_weather", "input_schema": SCHEMA}
ASK = [{"role": "user", "content": "Weather?"}]
MODEL = "tiny"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalTextEngine]:
    folder: Path = write_model(tmp_path_factory.mktemp("tools"), TEMPLATE, max_position_embeddings=2048)
    made = start_tiny(folder)
    yield made
    made.close()


class Serving:
    """A scripted engine behind a socket, and both clients on it."""

    def __init__(self, url: str, engine: Any) -> None:
        self.engine = engine
        self.openai = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


@contextmanager
def saying(engine: LocalTextEngine, *texts: str, chars: int = 3) -> Iterator[Serving]:
    scripted: Any = ScriptedEngine(engine, texts, chars) if texts else engine
    with serving(scripted, ServerConfig(served_model_names=(MODEL,))) as url:
        made = Serving(url, scripted)
        with made.openai, made.anthropic:
            yield made


@pytest.mark.parametrize("chars", [1, 7, 1000])
def test_responses_call_tools_and_go_on_with_the_results(engine: LocalTextEngine, chars: int) -> None:
    with saying(engine, "Let me see.\n" + PARIS + "\n" + ROME, "Sunny.", chars=chars) as on:
        asked: Any = {"model": MODEL, "input": "Weather?", "tools": [TOOL]}
        first = on.openai.responses.create(**asked)
        strictly(Response, first.to_dict(mode="python"))
        said, paris, rome = first.output
        assert said.content[0].text.strip() == "Let me see."
        assert [call.name for call in (paris, rome)] == ["get_weather"] * 2
        assert json.loads(paris.arguments) == {"city": "Paris"}
        assert json.loads(rome.arguments) == {"city": "Rome", "days": [1, 2]}
        assert len({paris.call_id, rome.call_id, paris.id, rome.id}) == 4
        assert first.status == "completed"

        results: Any = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in (paris, rome)
        ]
        by_id = on.openai.responses.create(**{**asked, "input": results}, previous_response_id=first.id)
        whole: Any = [{"role": "user", "content": "Weather?"}, *first.output, *results]
        by_items = on.openai.responses.create(**{**asked, "input": whole})
        assert by_id.output_text == by_items.output_text == "Sunny."
        assert on.engine.prompts[1] == on.engine.prompts[2]
        assert '"arguments": {"city": "Rome", "days": [1, 2]}}' in on.engine.prompts[1]
        assert on.engine.prompts[1].count("<|im_start|>tool\nsun<|im_end|>") == 2


@pytest.mark.parametrize("chars", [1, 7, 1000])
def test_messages_call_tools_and_go_on_with_the_results(engine: LocalTextEngine, chars: int) -> None:
    with saying(engine, "Let me see.\n" + PARIS + "\n" + ROME, "Sunny.", chars=chars) as on:
        asked: Any = {"model": MODEL, "max_tokens": 500, "tools": [CLAUDE_TOOL]}
        first = on.anthropic.messages.create(**asked, messages=ASK)
        strictly(Message, first.to_dict(mode="python"))
        said, paris, rome = first.content
        assert said.text.strip() == "Let me see."
        assert (paris.name, paris.input, rome.input) == (
            "get_weather",
            {"city": "Paris"},
            {"city": "Rome", "days": [1, 2]},
        )
        assert first.stop_reason == "tool_use"
        results = [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"} for call in (paris, rome)]
        talk: Any = [*ASK, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        second = on.anthropic.messages.create(**asked, messages=talk)
        assert (second.content[0].text, second.stop_reason) == ("Sunny.", "end_turn")
        assert on.engine.prompts[1].count("<|im_start|>tool\nsun<|im_end|>") == 2


@pytest.mark.parametrize("chars", [1, 7, 1000])
@pytest.mark.parametrize(
    "text", ["plain words", PARIS, "See:\n" + PARIS + ROME, PARIS + "\n\n" + ROME + " done", "a <tool"]
)
def test_streams_add_up_to_what_is_not_streamed(engine: LocalTextEngine, text: str, chars: int) -> None:
    with saying(engine, text, chars=chars) as on:
        asked: Any = {"model": MODEL, "input": "Weather?", "tools": [TOOL]}
        whole = [_shown(item) for item in on.openai.responses.create(**asked).output]
        with on.openai.responses.stream(**asked) as stream:
            arguments: dict[int, str] = {}
            for event in stream:
                if event.type == "response.function_call_arguments.delta":
                    arguments[event.output_index] = arguments.get(event.output_index, "") + event.delta
            final = stream.get_final_response().output
        assert [_shown(item) for item in final] == whole
        assert [item.arguments for item in final if item.type == "function_call"] == list(arguments.values())

        claude: Any = {"model": MODEL, "max_tokens": 500, "tools": [CLAUDE_TOOL], "messages": ASK}
        blocks = [_block(block) for block in on.anthropic.messages.create(**claude).content]
        with on.anthropic.messages.stream(**claude) as messages:
            assert [_block(block) for block in messages.get_final_message().content] == blocks
        assert [kind for kind, _ in blocks] == [kind for kind, _ in whole]
        assert [value for _, value in blocks] == [value for _, value in whole]


def _shown(item: Any) -> tuple[str, Any]:
    if item.type == "message":
        return "text", item.content[0].text
    return item.name, json.loads(item.arguments)


def _block(block: Any) -> tuple[str, Any]:
    return ("text", block.text) if block.type == "text" else (block.name, block.input)


def test_one_call_at_a_time_ends_the_answer_early(engine: LocalTextEngine) -> None:
    with saying(engine, PARIS + ROME + "never read " * 50) as on:
        answer = on.openai.responses.create(model=MODEL, input="?", tools=[TOOL], parallel_tool_calls=False)
        assert [_shown(item) for item in answer.output] == [("get_weather", {"city": "Paris"})]
        choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
        message = on.anthropic.messages.create(
            model=MODEL, max_tokens=99, messages=ASK, tools=[CLAUDE_TOOL], tool_choice=choice
        )
        assert [_block(block) for block in message.content] == [("get_weather", {"city": "Paris"})]
        assert message.stop_reason == "tool_use"
        assert on.engine.abandoned == 2


def test_the_clients_tool_runner_runs_unchanged(engine: LocalTextEngine) -> None:
    """It asks for a thread first; told that there is none, it sends the whole conversation."""
    asked_for: list[str] = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked_for.append(city)
        return "sun"

    with saying(engine, PARIS, "Sunny.") as on:
        runner = on.anthropic.beta.messages.tool_runner(
            model=MODEL, max_tokens=99, tools=[get_weather], messages=[{"role": "user", "content": "Weather?"}]
        )
        reasons = [(message.stop_reason, message.content[0].type) for message in runner]
        assert reasons == [("tool_use", "tool_use"), ("end_turn", "text")]
        assert asked_for == ["Paris"]
        assert "<|im_start|>tool\nsun<|im_end|>" in on.engine.prompts[-1]
        with pytest.raises(anthropic.BadRequestError, match="no threads are kept here") as caught:
            on.anthropic.messages.create(
                model=MODEL, max_tokens=1, messages=ASK, extra_body={"thread": {"type": "create"}}
            )
        assert caught.value.error_code == "thread_unsupported_request"


def test_tool_choice_none_leaves_the_text_as_it_is(engine: LocalTextEngine) -> None:
    with saying(engine, PARIS) as on:
        answer = on.openai.responses.create(model=MODEL, input="?", tools=[TOOL], tool_choice="none")
        assert answer.output_text == PARIS
        none: Any = {"type": "none"}
        message = on.anthropic.messages.create(
            model=MODEL, max_tokens=99, messages=ASK, tools=[CLAUDE_TOOL], tool_choice=none
        )
        assert [_block(block) for block in message.content] == [("text", PARIS)]


class GetWeather(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


def test_required_and_named_tools_are_called_by_weights_that_know_nothing(engine: LocalTextEngine) -> None:
    """The answer is constrained, so even a model of noise calls a tool, with arguments that its schema allows."""
    with saying(engine) as on:
        other = {**TOOL, "name": "other"}
        for choice, names in (
            ("required", {"get_weather", "other"}),
            ({"type": "function", "name": "other"}, {"other"}),
        ):
            answer: Any = on.openai.responses.create(
                model=MODEL,
                input="?",
                tools=[TOOL, other],
                tool_choice=choice,
                max_output_tokens=300,  # type: ignore
            )
            assert answer.output[0].type == "function_call"
            assert answer.output[0].name in names
            assert json.loads(answer.output[0].arguments)["city"] in ("Paris", "Rome")
        parsed = on.openai.responses.parse(
            model=MODEL, input="?", tools=[openai.pydantic_function_tool(GetWeather)], tool_choice="required"
        )
        assert isinstance(parsed.output[0].parsed_arguments, GetWeather)
        for picked in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
            message = on.anthropic.messages.create(
                model=MODEL,
                max_tokens=300,
                messages=ASK,
                tools=[CLAUDE_TOOL],
                tool_choice=picked,  # type: ignore
            )
            assert message.stop_reason == "tool_use"
            assert message.content[0].input["city"] in ("Paris", "Rome")


def test_a_required_call_is_streamed_and_may_be_cut(engine: LocalTextEngine) -> None:
    """Arguments come in pieces. Cut at the length they are incomplete, and a conversation can go on from it."""
    with saying(engine) as on:
        asked: Any = {"model": MODEL, "input": "?", "tools": [TOOL], "tool_choice": "required", "temperature": 0}
        for max_tokens in (300, 50, 42):  # whole, and cut within the arguments, which begin after 38 or so
            with on.openai.responses.stream(**asked, max_output_tokens=max_tokens) as stream:
                events = list(stream)
            final = strictly(Response, events[-1].response.to_dict(mode="python"))
            deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
            call = final.output[-1]
            first = [event.delta for event in deltas if event.output_index == len(final.output) - 1]
            assert (call.type, call.arguments) == ("function_call", "".join(first))
            assert len(deltas) > 1
            assert call.status == final.status == ("completed" if final.incomplete_details is None else "incomplete")
            if final.status == "incomplete":
                more = on.openai.responses.create(
                    model=MODEL, input="Go on.", previous_response_id=final.id, max_output_tokens=3
                )
                assert more.usage.output_tokens == 3

            claude: Any = {"model": MODEL, "max_tokens": max_tokens, "tools": [CLAUDE_TOOL], "messages": ASK}
            claude |= {"tool_choice": {"type": "any"}, "extra_body": {"temperature": 0}}
            with on.anthropic.messages.stream(**claude) as messages:
                streamed = messages.get_final_message()
            whole = on.anthropic.messages.create(**claude)
            strictly(Message, whole.to_dict(mode="python"))
            assert [_block(block) for block in streamed.content] == [_block(block) for block in whole.content]
            assert isinstance(whole.content[-1].input, dict)


def test_a_call_that_is_cut_off_is_incomplete(engine: LocalTextEngine) -> None:
    scripted: Any = ScriptedEngine(engine, [PARIS[:-22]], reason="length")
    with serving(scripted, ServerConfig(served_model_names=(MODEL,))) as url:
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            answer = client.responses.create(model=MODEL, input="?", tools=[TOOL])
            strictly(Response, answer.to_dict(mode="python"))
            assert (answer.status, answer.output[-1].status) == ("incomplete", "incomplete")
            on = client.responses.create(model=MODEL, input="go on", tools=[TOOL], previous_response_id=answer.id)
            assert on.status == "incomplete"
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
            message = other.messages.create(model=MODEL, max_tokens=5, messages=ASK, tools=[CLAUDE_TOOL])
            strictly(Message, message.to_dict(mode="python"))
            assert message.stop_reason == "max_tokens"


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([PARIS, ROME, "a", " b ", "\n", "<tool_call>{}</tool_call>", "<tool"]), max_size=6),
    st.data(),
)
def test_parts_have_the_order_of_the_text_however_it_is_cut(pieces: list[str], data: Any) -> None:
    """Items and content blocks stand in this order, so it must not depend on how many tokens came at once."""
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    assert (
        _read([text[a:b] for a, b in pairwise(sorted([0, len(text), *cuts]))]) == _read(list(text)) == _read([text])
    )


def _read(pieces: list[str]) -> list[str]:
    parser = tool_parser_for("hermes", ["get_weather"])
    told: list[str] = []
    for shown, calls in [*(part for piece in pieces for part in parser.parts(piece)), parser.finish()]:
        if shown and told and not told[-1].startswith("call "):
            told[-1] += shown
        elif shown:
            told.append(shown)
        told += [f"call {call.arguments}" for call in calls]
    return told
