"""Requests to /v1/responses and /v1/messages → conversations; what is not supported is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.errors import InvalidRequestError
from foretell.server import messages_request, responses_request
from foretell.server.answering import check_tools
from foretell.server.config import ServerConfig
from foretell.server.conversation import since, turn_starts
from foretell.server.errors import ApiError
from foretell.server.limits import validate
from foretell.server.protocol.anthropic import MessagesRequest
from foretell.server.protocol.responses import ResponsesRequest


def responses(**body: Any) -> ResponsesRequest:
    return validate(ResponsesRequest, body)


def messages(*turns: Any, **body: Any) -> MessagesRequest:
    return validate(MessagesRequest, {"model": "tiny", "max_tokens": 8, "messages": list(turns), **body})


CONFIG = ServerConfig()
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_responses_input_becomes_a_conversation() -> None:
    asked = responses(
        instructions="Be brief.",
        input=[
            {"role": "developer", "content": "In French."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_text", "text": "you"}],
            },
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "I need f."}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "One moment."}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "42"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "ok"}]},
            {"role": "user", "content": "And now?"},
        ],
    )
    second = {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}}
    assert responses_request.conversation(asked) == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "In French."},
        {"role": "user", "content": "Hi\nyou"},
        {
            "role": "assistant",
            "content": "One moment.",
            "reasoning_content": "I need f.",
            "tool_calls": [CALL, second],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
        {"role": "tool", "content": "ok", "tool_call_id": "c2", "name": "g"},
        {"role": "user", "content": "And now?"},
    ]


def test_messages_become_the_same_conversation() -> None:
    asked = messages(
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need f.", "signature": "x"},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "c1",
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                },
                {"type": "text", "text": "And now?"},
            ],
        },
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    )
    assert messages_request.conversation(asked) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nyou"},
        {"role": "assistant", "content": "One moment.", "reasoning_content": "I need f.", "tool_calls": [CALL]},
        {"role": "tool", "content": "Error: no", "tool_call_id": "c1", "name": "f"},
        {"role": "user", "content": "And now?"},
    ]


def test_a_previous_conversation_goes_between_instructions_and_input() -> None:
    before = [{"role": "user", "content": "f?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    asked = responses(instructions="New.", input=[{"type": "function_call_output", "call_id": "c1", "output": "42"}])
    talk = responses_request.conversation(asked, before)
    assert [message["role"] for message in talk] == ["system", "user", "assistant", "tool"]
    assert len(before) == 2


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools.0", "'web_search' is not supported"),
        ({"input": "x", "tools": [{"type": "mcp", "server_label": "x"}]}, "tools.0", "'mcp' is not supported"),
        ({"input": "x", "tool_choice": {"type": "file_search"}}, "tool_choice", "'file_search' is not supported"),
        ({"input": "x", "tool_choice": "any"}, "tool_choice", "'any' is not supported"),
        ({"input": "x", "background": True}, "background", "input should be False"),
        ({"input": "x", "conversation": "conv_1"}, "conversation", "previous_response_id"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"input": "x", "reasoning": {"effort": "high"}}, "reasoning.effort", "'none'"),
        ({"input": "x", "service_tier": "priority"}, "service_tier", "'auto' or 'default'"),
        ({"input": "x", "text": {"verbosity": "low"}}, "text.verbosity", "'medium'"),
        ({"input": "x", "text": {"format": {"type": "grammar"}}}, "text.format", "'grammar' is not supported"),
        ({"input": "x", "max_tokens": 5}, "max_tokens", "not a parameter"),
        ({"input": "x", "temperature": "1"}, "temperature", "valid number"),
        ({"input": "x", "temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"input": 5}, "input", "text or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference' is not supported"),
        ({"input": [{"type": 5}]}, "input.0", "type is missing"),
        ({"input": ["x"]}, "input.0", "object"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user', 'assistant'"),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "http://169.254.169.254/"}]}
                ]
            },
            "input.0.content.0",
            "nothing is fetched",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]},
            "input.0.content.0.text",
            "valid string",
        ),
    ],
)
def test_responses_refuses_by_name(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        responses(**body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking", "'enabled' is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0", "web_search_20250305"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "'function' is not supported"),
        ({"container": "c"}, "container", "not supported"),
        ({"output_config": {"effort": "low"}}, "output_config.effort", "'high'"),
        ({"temperature": 1.5}, "temperature", "less than or equal to 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"mcp_servers": []}, "mcp_servers", "not a parameter"),
        ({"messages": []}, "messages", "at least 1 item"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}
                ]
            },
            "messages.0.content.0",
            "nothing is fetched",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "messages.0.content.0.content.0",
            "nothing is fetched",
        ),
    ],
)
def test_messages_refuses_by_name(body: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        messages({"role": "user", "content": "x"}, **body)
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "empty"),
        ([{"type": "function_call_output", "call_id": "nope", "output": "x"}], "no such call"),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[1]"}], "no JSON object"),
        ([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "[" * 5000}], "no JSON object"),
        ([{"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "xyz"}], "encrypted"),
    ],
)
def test_responses_conversations_that_make_no_sense(items: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        responses_request.conversation(responses(input=items))


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([{"role": "system", "content": "x"}], "nothing to answer"),
        ([{"role": "user", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}], "belongs into"),
        ([{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "c"}]}], "belongs into"),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]}], "no such call"),
    ],
)
def test_messages_conversations_that_make_no_sense(turns: list[Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        messages_request.conversation(messages(*turns))


def test_an_answer_begun_by_the_client_is_gone_on_with() -> None:
    def goes_on(*turns: Any) -> bool:
        return messages_request.continues_answer(messages_request.conversation(messages(*turns)))

    user = {"role": "user", "content": "Capital of France?"}
    assert not goes_on(user)
    assert goes_on(user, {"role": "assistant", "content": "It is"})
    with pytest.raises(InvalidRequestError, match="white space"):
        goes_on(user, {"role": "assistant", "content": "It is "})
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    with pytest.raises(InvalidRequestError, match="send their results"):
        goes_on(user, {"role": "assistant", "content": [call]})


TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}, "strict": True} for name in "fg"]


def test_responses_tool_choice() -> None:
    def choice(value: Any, tools: Any = TOOLS) -> tuple[list[str], Any]:
        asked = responses(input="x", tools=tools, tool_choice=value)
        found, chosen = responses_request.tools_and_choice(asked)
        check_tools(found, chosen, CONFIG)
        return [tool["function"]["name"] for tool in found], chosen

    assert choice("required") == (["f", "g"], "required")
    assert choice({"type": "function", "name": "g"}) == (["f", "g"], {"name": "g"})
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    assert choice(allowed) == (["g"], "required")
    for wrong in ({"type": "function", "name": "h"}, {**allowed, "tools": [{"type": "function", "name": "h"}]}):
        with pytest.raises(ApiError, match="'h', which is not among"):
            choice(wrong)
    with pytest.raises(ApiError, match="there are no tools"):
        choice("required", None)
    with pytest.raises(ApiError, match="same name"):
        choice("auto", [*TOOLS, TOOLS[0]])


def test_messages_tool_choice() -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}, "description": "F."}]

    def choice(value: Any, tools: Any = tools) -> Any:
        asked = messages({"role": "user", "content": "x"}, tools=tools, tool_choice=value)
        found, chosen = messages_request.tools_and_choice(asked)
        check_tools(found, chosen, CONFIG)
        return found, chosen

    function = {"name": "f", "description": "F.", "parameters": {"type": "object"}}
    assert choice(None) == ([{"type": "function", "function": function}], "auto")
    assert choice({"type": "any"})[1] == "required"
    assert choice({"type": "none"})[1] == "none"
    assert choice({"type": "tool", "name": "f"})[1] == {"name": "f"}
    with pytest.raises(ApiError, match="not among"):
        choice({"type": "tool", "name": "g"})
    with pytest.raises(ApiError, match="there are no tools"):
        choice({"type": "any"}, None)


def test_older_turns_are_left_out_whole() -> None:
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "user", "content": "2"},
        {"role": "system", "content": "t"},
        {"role": "user", "content": "3"},
    ]
    shorter = [[message["content"] for message in since(talk, start)] for start in turn_starts(talk)]
    assert shorter == [["s", "2", "t", "3"], ["s", "t", "3"]]
    assert turn_starts(talk[:4]) == []
