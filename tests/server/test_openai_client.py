"""OpenAI's own client, unchanged, over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import run
from tests.server.live import serving

KEY = "sk-of-the-tests"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def url(tiny: LocalTextEngine) -> Iterator[str]:
    with serving(tiny, ServerConfig(api_keys=(KEY,), served_model_names=("tiny",))) as base:
        yield base + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_completions_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0)
    stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text != ""


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    readable = {"allowed_token_ids": list(range(90))}
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0, "extra_body": readable}
    text = client.chat.completions.create(**options).choices[0].message.content
    stop = text[4]
    whole = client.chat.completions.create(**options, stop=stop)
    with client.chat.completions.stream(**options, stop=stop) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content == text[: text.index(stop)]
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


def test_embeddings_in_both_encodings(client: openai.OpenAI) -> None:
    made = client.embeddings.create(model="tiny", input=["Hello", "other"])  # asks for base64, and decodes it
    plain = client.embeddings.create(model="tiny", input=[104, 105], encoding_format="float")
    assert [item.index for item in made.data] == [0, 1]
    assert sum(x * x for x in made.data[0].embedding) == pytest.approx(1.0, abs=1e-5)
    assert len(plain.data[0].embedding) == len(made.data[1].embedding) == 64
    assert made.usage.prompt_tokens == 10
    with pytest.raises(openai.BadRequestError, match="dimensions must be 64"):
        client.embeddings.create(model="tiny", input="x", dimensions=3)


def test_an_answer_of_a_form_is_parsed(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        capital: bool
        river: Literal["Seine", "Spree"]

    made = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=City, max_tokens=200)
    assert isinstance(made.choices[0].message.parsed, City)
    chosen = {"structured_outputs": {"choice": ["yes", "no"]}}
    answer = client.completions.create(model="tiny", prompt="Well?", max_tokens=50, extra_body=chosen)
    assert answer.choices[0].text in ("yes", "no")


def test_a_required_tool_is_called(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool: Any = {
        "type": "function",
        "function": {"name": "lamp", "parameters": {**schema, "additionalProperties": False}},
    }
    options: Any = {"model": "tiny", "messages": MESSAGES, "tools": [tool], "max_tokens": 300, "seed": 1}
    options["tool_choice"] = {"type": "function", "function": {"name": "lamp"}}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls or []
    assert call.function.name == "lamp"
    assert set(json.loads(call.function.arguments)) == {"on"}
    with client.chat.completions.stream(**options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert streamed.function.name == "lamp"
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_async_clients_share_the_engine(url: str) -> None:
    async def go() -> list[str]:
        import asyncio

        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=6, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(8)))

    assert len(set(run(go()))) == 1


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=url, api_key="sk-wrong-key") as other:
        other.models.list()


def test_a_deadline_that_passed_is_not_tried_again(client: openai.OpenAI) -> None:
    """The client sends a 408 again by itself, which here would be the same work for the same end."""
    patient = client.with_options(max_retries=2)
    long = {"max_tokens": 480, "extra_body": {"ignore_eos": True, "timeout_seconds": 0.001}}
    with pytest.raises(openai.APIStatusError, match="was not finished within") as caught:
        patient.completions.create(model="tiny", prompt="Hello", **long)
    assert caught.value.status_code == 408
    assert caught.value.request.headers["x-stainless-retry-count"] == "0"
