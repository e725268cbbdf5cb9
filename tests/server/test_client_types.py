"""What we answer is, field by field, what the openai client's own models say, and nothing else but what is listed."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from foretell.server.local_engine import LocalTextEngine
from tests.server.client import request
from tests.server.scripted import ScriptedEngine
from tests.server.strict import strictly

# vLLM's fields, which OpenAI does not have
CHOICE = ("stop_reason",)
TOKENS = ("token_ids", "prompt_token_ids", "prompt_logprobs")
MODEL = ("root", "parent", "max_model_len")

CHAT: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"stop": ["x", "e"]},
    {"max_tokens": None, "max_completion_tokens": 3},
    {"response_format": {"type": "text"}, "user": "u", "metadata": {"a": "b"}, "store": False},
    {"return_token_ids": True, "prompt_logprobs": 1},
]
COMPLETIONS: list[dict[str, Any]] = [
    {},
    {"n": 2},
    {"logprobs": 2},
    {"prompt": ["a", "b"], "seed": 5},
    {"prompt": [72, 105]},
    {"echo": True},
    {"return_token_ids": True, "prompt_logprobs": 1},
]


def post(engine: LocalTextEngine, path: str, **body: Any) -> Any:
    answer = request(engine, "POST", path, json={"model": engine.about.model, "max_tokens": 5, **body})
    assert answer.status_code == 200, answer.text
    return answer


def chunks(answer: Any) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("asked", CHAT, ids=str)
def test_chat(tiny: LocalTextEngine, asked: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], **asked}
    whole = post(tiny, "/v1/chat/completions", **body).json()
    beyond = CHOICE + (TOKENS if "return_token_ids" in asked else ())
    made = strictly(ChatCompletion, whole, beyond=beyond)
    assert [choice.index for choice in made.choices] == list(range(asked.get("n", 1)))
    body.pop("prompt_logprobs", None)  # of a whole answer only
    for options in (None, {"include_usage": True}):
        streamed = chunks(post(tiny, "/v1/chat/completions", **body, stream=True, stream_options=options))
        typed = [strictly(ChatCompletionChunk, chunk, beyond=beyond) for chunk in streamed]
        assert len({(chunk.id, chunk.created, chunk.model) for chunk in typed}) == 1
        ends = [choice.finish_reason for chunk in typed for choice in chunk.choices if choice.finish_reason]
        assert len(ends) == asked.get("n", 1)
        assert [chunk.usage is not None for chunk in typed] == [False] * (len(typed) - 1) + [options is not None]
        assert not options or typed[-1].choices == []


@pytest.mark.parametrize("chars", [2, 500])
def test_chat_with_tool_calls(tiny: LocalTextEngine, chars: int) -> None:
    calls = [f'<tool_call>\n{{"name": "f", "arguments": {{"n": {n}}}}}\n</tool_call>' for n in (1, 2)]
    engine: Any = ScriptedEngine(tiny, ["Let me see.\n" + "\n".join(calls)], chars)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    whole = strictly(ChatCompletion, post(engine, "/v1/chat/completions", **body).json(), beyond=CHOICE).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content.strip() == "Let me see."
    told = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls]
    assert told == [("f", {"n": 1}), ("f", {"n": 2})]
    state: Any = ChatCompletionStreamState()
    for chunk in chunks(post(engine, "/v1/chat/completions", **body, stream=True)):
        state.handle_chunk(strictly(ChatCompletionChunk, chunk, beyond=CHOICE))
    final = state.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == whole.message.content
    assert [(c.function.name, json.loads(c.function.arguments)) for c in final.message.tool_calls] == told


@pytest.mark.parametrize("asked", COMPLETIONS, ids=str)
def test_completions(tiny: LocalTextEngine, asked: dict[str, Any]) -> None:
    body = {"prompt": "Hello", **asked}
    beyond = CHOICE + (TOKENS if "return_token_ids" in asked else ())
    strictly(Completion, post(tiny, "/v1/completions", **body).json(), beyond=beyond)
    body.pop("prompt_logprobs", None)
    streamed = list(chunks(post(tiny, "/v1/completions", **body, stream=True)))
    assert streamed
    for chunk in streamed:
        for choice in chunk["choices"]:  # null until the end, as OpenAI streams it; its type was made for whole ones
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        strictly(Completion, chunk, beyond=beyond)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(tiny: LocalTextEngine, encoding: str) -> None:
    body = {"model": tiny.about.model, "input": ["Hello", "you"], "encoding_format": encoding}
    answer = request(tiny, "POST", "/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    made = answer.json()
    for entry in made["data"]:
        if encoding == "base64":  # the client decodes it before its own model sees it
            raw = base64.b64decode(entry["embedding"])
            entry["embedding"] = list(struct.unpack(f"<{len(raw) // 4}f", raw))
    strictly(CreateEmbeddingResponse, made)


def test_models(tiny: LocalTextEngine) -> None:
    cards = request(tiny, "GET", "/v1/models").json()["data"]
    assert cards
    for card in cards:
        strictly(Model, card, beyond=MODEL)
