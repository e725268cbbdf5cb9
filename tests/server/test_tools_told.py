"""Models whose template has no place for tools hear of them in words."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.core.params import SamplingParams
from foretell.server.chat import ChatRequest, prompt_ids
from foretell.server.local_engine import LocalTextEngine
from foretell.server.tools import template_knows_tools, told_in_words, tool_parser_for
from tests.server.tiny import TEMPLATE

TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does é.", "parameters": {"type": "object"}}}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Do it."},
    {"role": "assistant", "content": "Yes.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1", "tool_call_id": "c"},
    {"role": "tool", "content": "2", "tool_call_id": "c"},
    {"role": "user", "content": "Thanks."},
]


def prompt(engine: LocalTextEngine, **options: Any) -> str:
    assert engine.tokenizer is not None
    asked = ChatRequest(**{"messages": TALK, "params": SamplingParams(), "tools": TOOLS, **options})
    return engine.tokenizer.decode(prompt_ids(engine, asked), skip_special_tokens=False)


def test_nothing_of_the_request_is_lost(tiny: LocalTextEngine) -> None:
    assert not template_knows_tools(TEMPLATE)
    text = prompt(tiny)
    for words in ('"name": "f"', '"description": "Does é."', '"arguments": {"a": "é"}', ">\n1\n<", ">\n2\n<", "Yes."):
        assert words in text
    assert text.startswith("<|im_start|>system\n")
    assert text.count("<|im_start|>user\n") == 2  # two results, and what the user said then, in one message
    assert text.index("\n1\n") < text.index("\n2\n") < text.index("Thanks.")


def test_the_model_is_shown_the_form_that_is_read() -> None:
    """An example in the description, and an earlier call, are calls to the parser that reads the answer."""
    told = told_in_words(TALK, TOOLS)
    calls = tool_parser_for("hermes", ["f"]).push(told[2]["content"])[1]
    assert [(call.name, call.arguments) for call in calls] == [("f", '{"a": "é"}')] * 2
    example = tool_parser_for("hermes").push(told[0]["content"])[1]
    assert [call.name for call in example] == ["the tool's name"]


def test_a_system_message_stays_the_first_and_only_one() -> None:
    system = {"role": "system", "content": "Be brief."}
    told = told_in_words([system, *TALK], TOOLS)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert TALK[-1]["content"] == "Thanks.", "and what was sent is as it was"
    assert told[0]["content"].startswith("Be brief.\n\n")
    assert system["content"] == "Be brief."


@pytest.mark.parametrize("choice", ["required", {"name": "f"}])
def test_a_required_call_is_asked_for_as_it_is_constrained(tiny: LocalTextEngine, choice: Any) -> None:
    text = prompt(tiny, messages=TALK[:1], tool_choice=choice)
    assert "JSON list of calls" in text
    assert "<tool_call>" not in text


def test_without_tools_the_messages_are_as_they_were(tiny: LocalTextEngine) -> None:
    plain = [TALK[0], TALK[-1]]
    assert told_in_words(plain, []) == plain
    assert prompt(tiny, messages=plain, tool_choice="none") == prompt(tiny, messages=plain, tools=())
    assert "Do it." in prompt(tiny, tool_choice="none")
    assert "Does é." not in prompt(tiny, tool_choice="none")
