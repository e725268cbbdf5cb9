"""POST /v1/chat/completions, against what the engine itself says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foretell.core.params import SamplingParams
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from foretell.server.protocol.chat_answers import ChatCompletion, ChatCompletionChunk
from tests.server.client import request, run

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"messages": HELLO, "temperature": 0, "max_tokens": 8}


def post(engine: LocalTextEngine, **body: Any) -> ChatCompletion:
    answer = request(engine, "POST", "/v1/chat/completions", json={**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return ChatCompletion.model_validate(answer.json())


def chunks(engine: LocalTextEngine, **body: Any) -> list[ChatCompletionChunk]:
    answer = request(engine, "POST", "/v1/chat/completions", json={**GREEDY, "stream": True, **body})
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [ChatCompletionChunk.model_validate(json.loads(e.removeprefix("data: "))) for e in events[:-2]]


def direct(engine: LocalTextEngine, messages: Any = None, **params: Any) -> Any:
    ids = engine.llm.llm.chat_token_ids(messages or HELLO)
    return run(engine.llm.generate(ids, SamplingParams(**{"temperature": 0, "max_tokens": 8, **params})))


def test_the_answer_is_the_engines(tiny: LocalTextEngine) -> None:
    made, said = post(tiny), direct(tiny)
    assert made.choices[0].message.content == said.outputs[0].text
    assert made.choices[0].finish_reason == "length"
    assert made.usage.prompt_tokens == len(said.prompt_token_ids)


def test_contents_in_parts_and_developer_messages(tiny: LocalTextEngine) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    joined = [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Hel\nlo"}]
    sent = [{"role": "developer", "content": "Be short"}, {"role": "user", "content": parts}]
    assert post(tiny, messages=sent).choices[0].message.content == direct(tiny, joined).outputs[0].text


@pytest.mark.parametrize("n", [1, 3])
def test_streams_add_up_to_the_whole(tiny: LocalTextEngine, n: int) -> None:
    options = {"n": n, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 9}
    body = {**options, "max_tokens": None}
    whole = post(tiny, **body)
    pieces = chunks(tiny, **body, stream_options={"include_usage": True})
    last = pieces.pop()
    assert last.choices == []
    assert last.usage == whole.usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})  # type: ignore[union-attr]
    assert all(p.usage is None for p in pieces)
    for choice in whole.choices:
        mine = [c for p in pieces for c in p.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert mine[0].delta.content == ""
        assert all(c.delta.role is None for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        streamed = [t for c in mine if c.logprobs for t in c.logprobs.content or []]
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content or []]


def test_logprobs_spell_the_text(tiny: LocalTextEngine) -> None:
    made = post(tiny, logprobs=True, top_logprobs=3).choices[0]
    said = direct(tiny, logprobs=3).outputs[0]
    assert made.logprobs is not None
    content = made.logprobs.content or []
    assert [t.logprob for t in content] == pytest.approx([e.logprob for e in said.logprobs])
    spelled = b"".join(bytes(t.bytes or []) for t in content)
    assert spelled.decode("utf-8", "replace") == made.message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
    assert post(tiny).choices[0].logprobs is None


def test_prompt_logprobs_as_vllm_has_them(tiny: LocalTextEngine) -> None:
    made, said = post(tiny, prompt_logprobs=2), direct(tiny, prompt_logprobs=2)
    assert made.prompt_logprobs is not None
    assert made.prompt_logprobs[0] is None
    for shown, entry, token in zip(
        made.prompt_logprobs[1:], said.prompt_logprobs[1:], said.prompt_token_ids[1:], strict=True
    ):
        assert shown is not None
        assert shown[str(token)].logprob == pytest.approx(entry.logprob)
        assert shown[str(token)].rank == entry.rank
        assert {int(i) for i in shown} == {token, *(i for i, _ in entry.top)}


def test_usage_in_every_chunk(tiny: LocalTextEngine) -> None:
    pieces = chunks(tiny, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [p.usage.completion_tokens for p in pieces if p.usage]
    assert len(counts) == len(pieces)
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_the_assistants_turn_can_be_continued(tiny: LocalTextEngine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "I am"}]
    body = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    made = post(tiny, **body, return_token_ids=True)
    assert tiny.tokenizer is not None
    assert tiny.tokenizer.decode(made.prompt_token_ids or []).endswith("assistant\nI am")


def test_earlier_tool_calls_reach_the_template_as_objects() -> None:
    from foretell.server.chat_input import messages_of
    from foretell.server.protocol.chat import ChatMessage

    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    sent = [
        ChatMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [call]}),
        ChatMessage.model_validate({"role": "tool", "content": "1", "tool_call_id": "c1"}),
    ]
    made = messages_of(sent, ServerConfig())
    assert made[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": [1]}}
    assert made[0]["content"] == ""
    assert made[1] == {"role": "tool", "content": "1", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"functions": []}, "functions"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"), ({"messages": [{}]}, "role"),
        ({"messages": HELLO * 5000}, "messages"), ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 3}, "logprobs"), ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"), ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"), ({"store": True}, "store"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"reasoning_effort": "high"}, "reasoning"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"), ({"echo": True}, "echo"),
        ({"chat_template_kwargs": {f"k{i}": 1 for i in range(17)}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"), ({"tools": [{}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "same name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}],
          "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"), ({"web_search_options": {}}, "web_search"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(tiny: LocalTextEngine, body: dict[str, Any], word: str) -> None:
    answer = request(tiny, "POST", "/v1/chat/completions", json={**GREEDY, **body})
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]["message"]


def test_a_long_conversation_is_refused_before_it_is_queued(tiny: LocalTextEngine) -> None:
    answer = request(
        tiny,
        "POST",
        "/v1/chat/completions",
        ServerConfig(max_prompt_chars=50),
        json={**GREEDY, "messages": HELLO * 3},
    )
    assert answer.status_code == 400
    assert "50 are allowed" in answer.json()["error"]["message"]
