"""OpenAI's own client, unchanged, over a socket."""

from __future__ import annotations

from collections.abc import Iterator

import openai
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
