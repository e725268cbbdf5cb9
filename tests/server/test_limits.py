"""Each limit is configurable, and holds: what is within it is served, what is beyond it is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from foretell.errors import ConfigError
from foretell.server.config import ServerConfig
from foretell.server.errors import ApiError
from foretell.server.limits import check_size
from foretell.server.local_engine import LocalTextEngine
from foretell.server.protocol.completions import CompletionRequest
from tests.server.client import client_for, request, run
from tests.server.live import serving

HELLO = [{"role": "user", "content": "Hello"}]
COMPLETION = {"prompt": "Hello", "max_tokens": 1}
CHAT = {"messages": HELLO, "max_tokens": 1}


def tool(name: str, depth: int = 1) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


LIMITS: list[tuple[dict[str, Any], str, dict[str, Any], dict[str, Any]]] = [
    ({"max_n": 2}, "completions", {"n": 2}, {"n": 3}),
    ({"max_n": 2}, "chat", {"n": 2}, {"n": 3}),
    ({"max_outputs": 4}, "completions", {"prompt": ["a", "b"], "n": 2}, {"prompt": ["a", "b", "c"], "n": 2}),
    ({"max_prompts": 2}, "completions", {"prompt": ["a", "b"]}, {"prompt": ["a", "b", "c"]}),
    ({"max_prompt_chars": 9}, "completions", {"prompt": "x" * 9}, {"prompt": "x" * 10}),
    ({"max_prompt_chars": 55}, "chat", {}, {"messages": [{"role": "user", "content": "Hello!"}]}),
    ({"max_messages": 2}, "chat", {"messages": HELLO * 2}, {"messages": HELLO * 3}),
    ({"max_logprobs": 2}, "completions", {"logprobs": 2}, {"logprobs": 3}),
    ({"max_logprobs": 2}, "chat", {"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 3}),
    ({"max_prompt_logprobs": 2}, "completions", {"prompt_logprobs": 2}, {"prompt_logprobs": 3}),
    ({"max_stops": 2}, "completions", {"stop": ["a", "b"]}, {"stop": ["a", "b", "c"]}),
    ({"max_stop_chars": 3}, "chat", {"stop": "abc"}, {"stop": "abcd"}),
    ({"max_bad_words": 1}, "completions", {"bad_words": ["a"]}, {"bad_words": ["a", "b"]}),
    ({"max_token_list": 2}, "completions", {"logit_bias": {"1": 1, "2": 1}},
     {"logit_bias": {"1": 1, "2": 1, "3": 1}}),
    ({"max_token_list": 2}, "chat", {"allowed_token_ids": [1, 2]}, {"allowed_token_ids": [1, 2, 3]}),
    ({"max_token_list": 2}, "completions", {"stop_token_ids": [1, 2]}, {"stop_token_ids": [1, 2, 3]}),
    ({"max_tools": 1}, "chat", {"tools": [tool("a")]}, {"tools": [tool("a"), tool("b")]}),
    ({"max_schema_depth": 3}, "chat", {"tools": [tool("a", 3)]}, {"tools": [tool("a", 4)]}),
    ({"max_tool_bytes": 200}, "chat", {"tools": [tool("a")]}, {"tools": [tool("a" * 64), tool("b" * 64)]}),
    ({"max_schema_bytes": 9}, "completions", {"guided_regex": "[a-c]{1}"}, {"guided_regex": "[a-c]{1,5}"}),
    ({"max_schema_depth": 2}, "completions", {"guided_json": {"type": "object"}},
     {"guided_json": {"properties": {"a": {"type": "object"}}}}),
    ({"max_template_kwargs": 1}, "chat", {"chat_template_kwargs": {"a": 1}},
     {"chat_template_kwargs": {"a": 1, "b": 1}}),
    ({"max_json_depth": 3}, "chat", {}, {"metadata": {"a": {"b": {"c": {}}}}}),
    ({"max_json_values": 8}, "completions", {"prompt": [1, 2, 3, 4, 5]}, {"prompt": list(range(20))}),
    ({"max_object_keys": 3}, "completions", {}, {"n": 1, "stream": False}),
    ({"max_body_bytes": 200}, "completions", {}, {"user": "x" * 200}),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "route", "within", "beyond"), LIMITS, ids=lambda v: str(v)[:30])
def test_a_limit_holds(
    tiny: LocalTextEngine, limit: dict[str, Any], route: str, within: dict[str, Any], beyond: dict[str, Any]
) -> None:
    path, base = ("/v1/completions", COMPLETION) if route == "completions" else ("/v1/chat/completions", CHAT)
    config = ServerConfig(**limit)
    answer = request(tiny, "POST", path, config, json={**base, **within})
    assert answer.status_code == 200, answer.text
    refused = request(tiny, "POST", path, config, json={**base, **beyond})
    assert refused.status_code == (413 if "max_body_bytes" in limit else 400), refused.text
    assert str(next(iter(limit.values()))) in refused.json()["error"]["message"]
    assert request(tiny, "POST", path, json={**base, **beyond}).status_code in (200, 400)


QUOTES = st.text(alphabet='\\"[]{},ab ', max_size=12)


@given(value=st.recursive(QUOTES | st.integers(), lambda v: st.lists(v) | st.dictionaries(QUOTES, v), max_leaves=30))
def test_values_are_counted_without_parsing(value: Any) -> None:
    """At least all but one are counted, and none more than twice; what is in texts does not count."""

    def count(item: Any) -> int:
        if isinstance(item, dict):
            return 1 + sum(count(inner) for inner in item.values())
        return 1 + sum(count(inner) for inner in item) if isinstance(item, list) else 1

    body, values = json.dumps([value, 0]).encode(), count([value, 0])
    check_size(body, 2 * values)
    with pytest.raises(ApiError, match="values: send less"):
        check_size(body, values - 2)


def test_a_million_faults_are_one_complaint(tiny: LocalTextEngine) -> None:
    """Each of these took minutes when every entry was complained about."""
    config = ServerConfig(max_json_values=2**30, max_object_keys=2**30)
    for field, entry in (("prompt", "1.5"), ("prompt", "{}"), ("stop", "1"), ("stop_token_ids", "-1")):
        body = f'{{"prompt": "x", "{field}": [{",".join([entry] * 50_000)}]}}'.replace(
            '"prompt": "x", "prompt"', '"prompt"'
        )
        answer = request(
            tiny, "POST", "/v1/completions", config, content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "x", "stop_token_ids": [-1] * 50_000})
    assert len(caught.value.errors()) == 1


def test_an_embeddings_request_has_a_limit_too(tiny: LocalTextEngine) -> None:
    config = ServerConfig(max_inputs=2)
    assert request(tiny, "POST", "/v1/embeddings", config, json={"input": ["a", "b"]}).status_code == 200
    assert request(tiny, "POST", "/v1/embeddings", config, json={"input": ["a", "b", "c"]}).status_code == 400


def test_a_body_in_chunks_is_stopped_at_the_limit(tiny: LocalTextEngine) -> None:
    """Nobody says how long it will be: reading ends once it is too long, and not at its end."""
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b"[" * 1000
            await asyncio.sleep(0)

    async def go() -> Any:
        async with client_for(tiny, ServerConfig(max_body_bytes=10_000)) as client:
            headers = {"content-type": "application/json"}
            return await client.post("/v1/completions", content=body(), headers=headers)

    answer = run(go())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert sent <= 30_000


async def raw(port: int, text: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\nconnection: close\r\n"


def test_a_body_that_does_not_come_is_given_up(tiny: LocalTextEngine) -> None:
    with serving(tiny, ServerConfig(body_timeout_seconds=0.1)) as url:
        port = int(url.rpartition(":")[2])
        answer = run(raw(port, HEAD + b'content-length: 100\r\n\r\n{"prompt": '))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"


def test_a_stated_length_beyond_the_limit_is_refused_with_an_answer(tiny: LocalTextEngine) -> None:
    with serving(tiny, ServerConfig(max_body_bytes=1000)) as url:
        port = int(url.rpartition(":")[2])
        whole = b"[" * 50_000
        answer = run(raw(port, HEAD + b"content-length: 50000\r\n\r\n" + whole))
        lying = run(raw(port, HEAD + b"content-length: 99999999999999999999\r\n\r\n[]"))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert lying[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 400", b"")


@pytest.mark.parametrize(
    "headers",
    [{"content-type": "text/plain"}, {"content-type": "multipart/form-data"}, {"content-type": ""}, {},
     {"content-type": "application/json", "content-encoding": "gzip"}],
)  # fmt: skip
def test_only_plain_json_is_read(tiny: LocalTextEngine, headers: dict[str, str]) -> None:
    """Also what keeps a foreign page's form from reaching the server: such a page cannot send JSON unasked."""
    answer = request(tiny, "POST", "/v1/completions", content=json.dumps(COMPLETION), headers=headers)
    assert answer.status_code == 415


def test_json_with_a_charset_is_read(tiny: LocalTextEngine) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = request(tiny, "POST", "/v1/completions", content=json.dumps(COMPLETION), headers=headers)
    assert answer.status_code == 200


def test_deadlines_are_bounded_and_kept(tiny: LocalTextEngine) -> None:
    slow = {"prompt": "Hello", "max_tokens": 480, "ignore_eos": True}
    answer = request(tiny, "POST", "/v1/completions", json={**slow, "timeout_seconds": 0.0001})
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    config = ServerConfig(default_timeout_seconds=0.0001)
    assert request(tiny, "POST", "/v1/completions", config, json=slow).status_code == 408
    config = ServerConfig(default_timeout_seconds=0.0001, max_timeout_seconds=0.0002)
    assert request(tiny, "POST", "/v1/completions", config, json={**slow, "timeout_seconds": 60}).status_code == 408
    with pytest.raises(ConfigError, match="larger than max_timeout_seconds"):
        ServerConfig(default_timeout_seconds=10, max_timeout_seconds=5)
