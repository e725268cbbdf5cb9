"""/v1/messages through Anthropic's own client, unchanged, over a socket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import ErrorResponse, Message

from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import run
from tests.server.live import serving
from tests.server.strict import strictly
from tests.server.test_responses_client import Pick, offline

KEY = "sk-of-the-tests"
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def url(tiny: LocalTextEngine) -> Iterator[str]:
    with serving(tiny, ServerConfig(api_keys=(KEY,), served_model_names=("tiny",))) as base:
        yield base


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_an_answer_equals_the_offline_one_whole_and_streamed(
    client: anthropic.Anthropic, tiny: LocalTextEngine
) -> None:
    wanted = offline(tiny, [{"role": "system", "content": "Be brief."}, *HELLO])
    asked = {**GREEDY, "system": "Be brief.", "messages": HELLO}
    whole = client.messages.create(**asked)
    strictly(Message, whole.to_dict(mode="python"))
    assert [block.text for block in whole.content] == [wanted]
    assert (whole.stop_reason, whole.stop_sequence, whole.usage.output_tokens) == ("max_tokens", None, 12)
    with client.messages.stream(**asked) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == final.content[0].text == wanted
    assert final.stop_reason == "max_tokens"
    total = whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == total
    counted = client.messages.count_tokens(model="tiny", system="Be brief.", messages=HELLO)
    assert counted.input_tokens == total


def test_cached_prefixes_are_counted_apart(client: anthropic.Anthropic) -> None:
    asked = {**GREEDY, "messages": [{"role": "user", "content": "the same long beginning " * 8}]}
    client.messages.create(**asked)
    usage = client.messages.create(**asked).usage
    assert usage.cache_read_input_tokens > 100
    assert usage.input_tokens < 100


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic, tiny: LocalTextEngine) -> None:
    text = offline(tiny, HELLO, 40)
    stop = next(c for c in text[3:] if not c.isspace())
    asked = {**GREEDY, "max_tokens": 40, "messages": HELLO, "stop_sequences": [stop, "never there"]}
    whole = client.messages.create(**asked)
    assert (whole.stop_reason, whole.stop_sequence) == ("stop_sequence", stop)
    assert whole.content[0].text == text[: text.index(stop)]
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().to_dict()["content"] == whole.to_dict()["content"]


def test_the_context_runs_out_by_its_own_name(client: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "x" * 470}]
    bias = {"temperature": 0}
    answer = client.messages.create(model="tiny", max_tokens=400, messages=long, extra_body=bias)
    if answer.stop_reason != "end_turn":  # whichever the dummy weights give
        assert answer.stop_reason == "model_context_window_exceeded"
    with pytest.raises(anthropic.BadRequestError, match="512"):
        client.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": "x" * 600}])


def test_an_answer_that_was_begun_is_gone_on_with(client: anthropic.Anthropic, tiny: LocalTextEngine) -> None:
    text = offline(tiny, HELLO)
    begun = text[:3].rstrip()
    assert begun
    assert tiny.tokenizer is not None
    answer = client.messages.create(**GREEDY, messages=[*HELLO, {"role": "assistant", "content": begun}])
    prompt = tiny.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True) + begun
    ids = tiny.preparer.token_ids(prompt, add_special_tokens=False)
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == len(ids)


def test_the_async_client(url: str, tiny: LocalTextEngine) -> None:
    wanted = offline(tiny, HELLO)

    async def go() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0) as client:
            whole = await client.messages.create(**GREEDY, messages=HELLO)
            async with client.messages.stream(**GREEDY, messages=HELLO) as stream:
                pieces = [text async for text in stream.text_stream]
            return whole.content[0].text, "".join(pieces)

    assert run(go()) == (wanted, wanted)


def test_errors_are_the_clients_own_kinds(client: anthropic.Anthropic, url: str) -> None:
    asked: Any = {"max_tokens": 4, "messages": HELLO}
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude-9", **asked)
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="'enabled' is not supported") as refused:
        client.messages.create(model="tiny", **asked, thinking={"type": "enabled", "budget_tokens": 1024})
    assert refused.value.type == "invalid_request_error"
    strictly(ErrorResponse, refused.value.body)
    with (
        pytest.raises(anthropic.AuthenticationError),
        anthropic.Anthropic(base_url=url, api_key="sk-wrong-key", max_retries=0) as other,
    ):
        other.messages.create(model="tiny", **asked)


def test_requests_are_traced_by_their_id(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(model="tiny", max_tokens=1, messages=HELLO)
    assert raw.headers["request-id"].startswith("req-")
    assert raw.headers["request-id"] == raw.headers["x-request-id"]
    with pytest.raises(anthropic.BadRequestError) as caught:
        client.messages.create(model="tiny", max_tokens=0, messages=HELLO)
    assert caught.value.request_id is not None


@pytest.mark.parametrize(
    ("version", "status"), [("2023-06-01", 200), (None, 200), ("2023-01-01", 400), ("latest", 400)]
)
def test_versions_from_before_this_interface_are_refused(url: str, version: str | None, status: int) -> None:
    headers = {"x-api-key": KEY} | ({"anthropic-version": version} if version else {})
    body = {"model": "tiny", "max_tokens": 1, "messages": HELLO}
    assert httpx.post(f"{url}/v1/messages", headers=headers, json=body).status_code == status


def test_answers_are_parsed_into_a_model_of_the_client(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 200, "messages": HELLO, "output_format": Pick}
    whole = client.messages.parse(**asked)
    assert isinstance(whole.parsed_output, Pick)
    assert whole.stop_reason == "end_turn"
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_message().parsed_output == whole.parsed_output
