"""What clients are known to send, and to expect back: none of it may be refused, and none may be misread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from foretell.server.protocol.chat import ChatMessage
from tests.server.client import request
from tests.server.tiny import start_tiny, write_model

HELLO = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"messages": HELLO, "temperature": 0, "max_tokens": 4}
COMPLETION: dict[str, Any] = {"prompt": "Hello", "temperature": 0, "max_tokens": 4}
SHAPES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}


def post(engine: LocalTextEngine, path: str, **body: Any) -> httpx.Response:
    return request(engine, "POST", path, json=body)


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer.json()["choices"]]


# vLLM's request models, written out with all their defaults
VLLM: dict[str, Any] = {
    "frequency_penalty": 0.0, "presence_penalty": 0.0, "logit_bias": None, "n": 1, "seed": None, "stop": [],
    "stream": False, "stream_options": None, "user": None, "use_beam_search": False, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "allowed_token_ids": None, "prompt_logprobs": None, "response_format": None,
    "structured_outputs": None, "priority": 0, "request_id": None, "logits_processors": None, "bad_words": [],
    "return_tokens_as_token_ids": None, "return_token_ids": None, "cache_salt": None, "kv_transfer_params": None,
    "vllm_xargs": None, "guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None,
    "structural_tag": None, "guided_decoding_backend": None, "guided_whitespace_pattern": None,
}  # fmt: skip
VLLM_CHAT = {
    "logprobs": False, "top_logprobs": 0, "max_completion_tokens": None, "tools": None, "tool_choice": "none",
    "reasoning_effort": None, "include_reasoning": True, "echo": False, "add_generation_prompt": True,
    "continue_final_message": False, "add_special_tokens": False, "documents": None, "chat_template": None,
    "chat_template_kwargs": None, "mm_processor_kwargs": None,
}  # fmt: skip
VLLM_COMPLETION = {"best_of": None, "echo": False, "logprobs": None, "suffix": None, "add_special_tokens": True}


@pytest.mark.parametrize(
    ("path", "more"), [("/v1/chat/completions", VLLM_CHAT), ("/v1/completions", VLLM_COMPLETION)]
)
def test_every_default_of_vllms_clients_written_out_changes_nothing(
    tiny: LocalTextEngine, path: str, more: dict[str, Any]
) -> None:
    plain = post(tiny, path, **SHAPES[path])
    assert texts(post(tiny, path, **SHAPES[path], **VLLM, **more)) == texts(plain)


@pytest.mark.parametrize("name", sorted(k for k, v in (VLLM | VLLM_CHAT).items() if v is None and k != "seed"))
def test_what_is_null_by_default_and_not_supported_is_refused_when_it_is_said(
    tiny: LocalTextEngine, name: str
) -> None:
    """With a value of no sense for any: whoever supports the field says what is wrong with it."""
    answer = post(tiny, "/v1/chat/completions", **CHAT, **{name: [{"x": []}]})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", SHAPES)
def test_both_names_of_max_tokens_at_once(tiny: LocalTextEngine, path: str) -> None:
    """As GuideLLM sends them, to either interface."""
    body = {**SHAPES[path], "max_tokens": 3, "max_completion_tokens": 3, "ignore_eos": True, "stop": None}
    assert post(tiny, path, **body).json()["usage"]["completion_tokens"] == 3
    body["max_tokens"] = None
    assert post(tiny, path, **body).json()["usage"]["completion_tokens"] == 3
    body["max_tokens"] = 2
    answer = post(tiny, path, **body)
    assert answer.status_code == 400
    assert "contradict" in answer.json()["error"]["message"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_likelihoods_of_a_continuation_as_lm_eval_asks_for_them(tiny: LocalTextEngine, max_tokens: int) -> None:
    """Context and continuation as token ids, several at once; each continuation's figures stand where it does."""
    pairs = [([72, 101, 108], [108, 111]), ([87], [111, 114, 108, 100]), ([72, 101], [121])]
    body = {"prompt": [a + b for a, b in pairs], "temperature": 0, "max_tokens": max_tokens, "logprobs": 1}
    answer = post(tiny, "/v1/completions", **body, seed=1234, echo=True)
    assert answer.status_code == 200, answer.text
    choices = sorted(answer.json()["choices"], key=lambda c: c["index"])
    for (context, continuation), choice in zip(pairs, choices, strict=True):
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(context) + len(continuation) + max_tokens
        assert found["token_logprobs"][0] is None
        end = -max_tokens or None
        for at, token in enumerate(continuation, start=len(context)):
            alone = post(
                tiny,
                "/v1/completions",
                prompt=(context + continuation)[:at],
                max_tokens=1,
                logprobs=0,
                allowed_token_ids=[token],
            )
            (wanted,) = alone.json()["choices"][0]["logprobs"]["token_logprobs"]
            assert found["token_logprobs"][at] == pytest.approx(wanted, abs=1e-4)
        for token, likeliest in zip(found["tokens"][1:end], found["top_logprobs"][1:end], strict=True):
            assert token in likeliest  # and whether it is the likeliest can be told
            assert 1 <= len(likeliest) <= 2


def test_a_message_that_says_it_is_text(tiny: LocalTextEngine) -> None:
    """lm-eval puts a type into every message."""
    sent = [{**message, "type": "text"} for message in HELLO]
    assert texts(post(tiny, "/v1/chat/completions", **{**CHAT, "messages": sent})) == texts(
        post(tiny, "/v1/chat/completions", **CHAT)
    )


def test_marks_for_a_cache_on_parts_of_a_message(tiny: LocalTextEngine) -> None:
    """As aider and others send them, whatever the provider."""
    for mark in ({"cache_control": {"type": "ephemeral"}}, {"prompt_cache_breakpoint": {"mode": "explicit"}}):
        sent = [{"role": "user", "content": [{"type": "text", "text": "Hello", **mark}]}]
        assert texts(post(tiny, "/v1/chat/completions", **{**CHAT, "messages": sent})) == texts(
            post(tiny, "/v1/chat/completions", **CHAT)
        )


@pytest.mark.parametrize("part", [{"type": "text", "text": "x", "bold": True}, {"type": "text", "text": 5}])
def test_a_text_part_that_is_wrong_is_told_so(tiny: LocalTextEngine, part: dict[str, Any]) -> None:
    sent = [{"role": "user", "content": [part]}]
    answer = post(tiny, "/v1/chat/completions", **{**CHAT, "messages": sent})
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert "holds text as a string" in message
    assert "reads text only" not in message


def test_reasoning_of_earlier_turns_under_both_its_names() -> None:
    from foretell.server.chat_input import messages_of

    for name in ("reasoning", "reasoning_content"):
        message = ChatMessage.model_validate({"role": "assistant", "content": "So.", name: "Hm."})
        assert messages_of([message], ServerConfig())[0]["reasoning_content"] == "Hm."


FORMS = [
    ({"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name", "required"),
    (
        {"type": "json_schema", "json_schema": {"name": "x", "scheme": {}}},
        "response_format.json_schema.scheme",
        "not",
    ),
    ({"type": "xml"}, "response_format", "'xml' is not supported: use text, json_object, json_schema"),
    ({}, "response_format", "type is missing"),
]


@pytest.mark.parametrize(("form", "param", "words"), FORMS)
def test_what_is_wrong_with_a_form_is_told_of_that_form(
    tiny: LocalTextEngine, form: dict[str, Any], param: str, words: str
) -> None:
    error = post(tiny, "/v1/chat/completions", **CHAT, response_format=form).json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "param", "words"),
    [
        ("stop", "", "stop", "at least 1 character"),
        ("stop", ["a", ""], "stop.1", "at least 1 character"),
        ("prompt", ["a", ""], "prompt.1", "at least 1 character"),
        ("prompt", [[1], [-1]], "prompt.1.0", "greater than or equal to 0"),
        ("prompt", {"a": 1}, "prompt", "valid"),
    ],
)
def test_a_fault_is_named_as_the_client_wrote_it(
    tiny: LocalTextEngine, field: str, value: Any, param: str, words: str
) -> None:
    error = post(tiny, "/v1/completions", **{**COMPLETION, field: value}).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


def test_vllms_structured_outputs_written_out(tiny: LocalTextEngine) -> None:
    form = {
        "json": None, "regex": None, "choice": ["yes", "no"], "grammar": None, "json_object": None,
        "disable_fallback": False, "disable_any_whitespace": False, "disable_additional_properties": False,
        "whitespace_pattern": None, "structural_tag": None,
    }  # fmt: skip
    (text,) = texts(post(tiny, "/v1/completions", prompt="Well?", max_tokens=9, structured_outputs=form))
    assert text in ("yes", "no")


def coding_agent(**more: Any) -> dict[str, Any]:
    """A request in the manner of Claude Code: system blocks with marks, many long tools, a turn with a tool."""
    mark = {"cache_control": {"type": "ephemeral", "scope": "global"}}
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"type": "string", "description": "What to run."}},
        "required": ["command"],
        "additionalProperties": False,
    }
    tools = [{"name": f"mcp__server_{i:02}__{'tool' * 15}", "description": "d" * 6000, "input_schema": schema}
             for i in range(20)]  # fmt: skip
    call = {"type": "tool_use", "id": "toolu_1", "name": tools[0]["name"], "input": {"command": "ls"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a.py"}], **mark}
    return {
        "model": "m",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [{"type": "text", "text": "You are brief.", **mark}, {"type": "text", "text": "Very."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "List the files.", **mark}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}, call]},
            {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
        ],
        "tools": tools,
        "tool_choice": {"type": "auto"},
        "metadata": {"user_id": "user_0_account__session_1"},
        "thinking": {"type": "disabled"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        **more,
    }


def test_a_coding_agents_request(tmp_path: Path) -> None:
    """Its tools take 120 KB; counted here, for the model's context is smaller than that."""
    engine = start_tiny(write_model(tmp_path / "model", max_position_embeddings=2048))
    config = ServerConfig(served_model_names=("m",))
    sent = coding_agent()
    few = {**sent, "tools": [{**tool, "description": "d"} for tool in sent["tools"][:1]]}
    asked = {name: sent[name] for name in ("model", "messages", "system", "tools", "tool_choice", "thinking")}
    try:
        answer = request(engine, "POST", "/v1/messages?beta=true", config, json=few)
        counted = request(engine, "POST", "/v1/messages/count_tokens?beta=true", config, json=asked)
    finally:
        engine.close()
    assert answer.status_code == 200, answer.text
    assert answer.text.startswith("event: message_start")
    assert "event: message_stop" in answer.text
    assert counted.json()["input_tokens"] > 120_000


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "clear_tool_uses_20250919"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "x"}}]}}, "keep"),
        ({"output_config": {"effort": "low"}}, "effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "'enabled' is not supported"),
    ],
)
def test_what_a_coding_agent_may_ask_that_is_not_done_here(
    tiny: LocalTextEngine, more: dict[str, Any], words: str
) -> None:
    config = ServerConfig(served_model_names=("m",))
    answer = request(tiny, "POST", "/v1/messages", config, json=coding_agent(**more))
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_stream_is_the_same_with_every_field_null(tiny: LocalTextEngine) -> None:
    """LibreChat and others send what they do not use as null."""
    from foretell.server.protocol.chat import ChatCompletionRequest

    nulls: dict[str, Any] = dict.fromkeys(ChatCompletionRequest.model_fields, None)
    plain = post(tiny, "/v1/chat/completions", **CHAT, stream=True)
    answer = post(tiny, "/v1/chat/completions", **{**nulls, **CHAT, "stream": True})
    assert answer.status_code == 200, answer.text

    def deltas(text: str) -> list[Any]:
        return [json.loads(line[6:])["choices"] for line in text.splitlines() if line.startswith("data: {")]

    assert deltas(answer.text) == deltas(plain.text)
