"""/v1/responses through OpenAI's own client, unchanged, over a socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest
from openai.types.responses import InputTokenCountResponse, Response

from foretell.core.params import SamplingParams
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import run
from tests.server.live import serving
from tests.server.strict import strictly

KEY = "sk-of-the-tests"
OTHER_KEY = "sk-of-somebody-else"
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def url(tiny: LocalTextEngine) -> Iterator[str]:
    config = ServerConfig(api_keys=(KEY, OTHER_KEY), served_model_names=("tiny",), stored_responses=8)
    with serving(tiny, config) as base:
        yield base + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


def offline(tiny: LocalTextEngine, messages: list[dict[str, str]], max_tokens: int = 12) -> str:
    """The same answer without a server."""
    assert tiny.tokenizer is not None
    prompt = tiny.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = tiny.preparer.token_ids(prompt, add_special_tokens=False)
    outputs = tiny.llm.llm.generate([ids], SamplingParams(temperature=0, max_tokens=max_tokens), progress=False)
    return outputs[0].outputs[0].text


def test_an_answer_equals_the_offline_one_whole_and_streamed(client: openai.OpenAI, tiny: LocalTextEngine) -> None:
    wanted = offline(tiny, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
    whole = client.responses.create(**GREEDY, instructions="Be brief.", input="Hello", metadata={"a": "b"})
    strictly(Response, whole.to_dict(mode="python"))
    assert whole.output_text == wanted != ""
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (whole.metadata, whole.instructions, whole.temperature) == ({"a": "b"}, "Be brief.", 0)
    assert whole.usage.output_tokens == 12
    assert whole.usage.total_tokens == 12 + whole.usage.input_tokens

    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    stream = client.responses.create(**GREEDY, instructions="Be brief.", input=parts, stream=True)
    events = list(stream)
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == wanted
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == wanted
    assert [one.sequence_number for one in events] == list(range(len(events)))


def test_the_streaming_helper_gives_the_final_response(client: openai.OpenAI) -> None:
    text = client.responses.create(**GREEDY, input="Hi").output_text
    # a stop string is not in this interface; the model's own end is, when its budget is the whole context
    with client.responses.stream(model="tiny", temperature=0, input="Hi") as stream:
        kinds = [one.type for one in stream]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text


def test_a_conversation_goes_on_by_id(client: openai.OpenAI, tiny: LocalTextEngine) -> None:
    first = client.responses.create(**GREEDY, instructions="Once.", input="Hello")
    second = client.responses.create(**GREEDY, input="And?", previous_response_id=first.id)
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.output_text}]
    wanted = offline(tiny, [*talk, {"role": "user", "content": "And?"}])
    assert second.output_text == wanted
    assert second.previous_response_id == first.id
    with client.responses.stream(**GREEDY, input="And?", previous_response_id=first.id) as stream:
        events = list(stream)
    third = events[-1].response
    assert third.output_text == wanted
    assert client.responses.retrieve(third.id).output_text == wanted


def test_kept_answers_are_read_and_forgotten_by_their_owner_only(client: openai.OpenAI, url: str) -> None:
    made = client.responses.create(**GREEDY, input="Hello")
    assert client.responses.retrieve(made.id, stream=False).to_dict() == made.to_dict()
    for asked in ({"stream": True}, {"starting_after": 3}, {"include": ["message.output_text.logprobs"]}):
        with pytest.raises(openai.BadRequestError, match="comes whole"):  # a whole answer read as a stream is empty
            client.responses.retrieve(made.id, **asked)
    with openai.OpenAI(base_url=url, api_key=OTHER_KEY, max_retries=0) as other:
        for attempt in (other.responses.retrieve, other.responses.delete):
            with pytest.raises(openai.NotFoundError, match="no response"):
                attempt(made.id)
        with pytest.raises(openai.BadRequestError, match="no response") as caught:
            other.responses.create(**GREEDY, input="x", previous_response_id=made.id)
        assert caught.value.param == "previous_response_id"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_what_shall_not_be_kept_is_not(client: openai.OpenAI) -> None:
    made = client.responses.create(**GREEDY, input="Hello", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_only_the_latest_answers_are_kept(client: openai.OpenAI) -> None:
    ids = [client.responses.create(model="tiny", max_output_tokens=1, input="x").id for _ in range(10)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ids[0])
    for kept in ids[-8:]:
        assert client.responses.retrieve(kept).id == kept


def test_truncation_auto_drops_the_oldest_turns(client: openai.OpenAI, tiny: LocalTextEngine) -> None:
    turns = [{"role": "user", "content": letter * 200} for letter in "abc"]
    with pytest.raises(openai.BadRequestError, match="512"):
        client.responses.create(**GREEDY, input=turns)
    answer = client.responses.create(**GREEDY, instructions="s", input=turns, truncation="auto")
    kept = [{"role": "system", "content": "s"}, *turns[1:]]
    assert answer.output_text == offline(tiny, kept)
    with pytest.raises(openai.BadRequestError, match="512"):
        client.responses.create(**GREEDY, input="x" * 600, truncation="auto")


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "input": "Hello", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    whole = client.responses.create(**asked)
    part = whole.output[0].content[0]
    assert len(part.logprobs) == whole.usage.output_tokens == 12
    for entry in part.logprobs:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    events = list(client.responses.create(**asked, stream=True))
    streamed = [entry for one in events if one.type == "response.output_text.delta" for entry in one.logprobs]
    names = [entry.token for entry in part.logprobs]
    assert [entry.token for entry in streamed] == names[: len(streamed)]


def test_inputs_are_counted_as_they_are_used(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": "Hello", "instructions": "Be brief."}
    first = client.responses.create(**asked, max_output_tokens=2)
    counted = client.responses.input_tokens.count(**asked)
    strictly(InputTokenCountResponse, counted.to_dict(mode="python"))
    assert counted.input_tokens == first.usage.input_tokens
    on = client.responses.input_tokens.count(model="tiny", input="And?", previous_response_id=first.id)
    assert (
        on.input_tokens
        == client.responses.create(
            model="tiny", input="And?", previous_response_id=first.id, max_output_tokens=1
        ).usage.input_tokens
    )


def test_the_async_client(url: str, tiny: LocalTextEngine) -> None:
    wanted = offline(tiny, [{"role": "user", "content": "Hello"}])

    async def go() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            whole = await client.responses.create(**GREEDY, input="Hello")
            async with client.responses.stream(**GREEDY, input="Hello") as stream:
                texts = [one.delta async for one in stream if one.type == "response.output_text.delta"]
            return whole.output_text, "".join(texts)

    assert run(go()) == (wanted, wanted)


def test_errors_are_the_clients_own_kinds(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.responses.create(model="gpt-9", input="x")
    with pytest.raises(openai.BadRequestError, match="'web_search' is not supported") as caught:
        client.responses.create(model="tiny", input="x", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools.0"
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        client.responses.create(model="tiny", input="x", tool_choice={"type": "function", "name": "f"})


class Pick(pydantic.BaseModel):
    """Small enough for dummy weights to come to an end."""

    model_config = pydantic.ConfigDict(extra="forbid")
    colour: Literal["red", "green"]
    big: bool


def test_answers_are_parsed_into_a_model_of_the_client(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "input": "Pick.", "text_format": Pick}
    whole = client.responses.parse(**asked)
    assert isinstance(whole.output_parsed, Pick)
    assert whole.status == "completed"
    assert whole.text.format.type == "json_schema"
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == whole.output_parsed


def test_any_json_object_may_be_asked_for(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_object"}}
    answer = client.responses.create(**{**GREEDY, "max_output_tokens": 200}, input="Hello", text=form)
    assert answer.output_text.lstrip().startswith("{")
    if answer.status == "completed":
        assert isinstance(json.loads(answer.output_text), dict)


def test_schemas_have_limits_here_too(client: openai.OpenAI) -> None:
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(40):
        deep = {"type": "object", "properties": {"a": deep}}
    form: Any = {"format": {"type": "json_schema", "name": "deep", "schema": deep}}
    with pytest.raises(openai.BadRequestError, match="nested deeper") as caught:
        client.responses.create(**GREEDY, input="x", text=form)
    assert caught.value.param in ("text.format.schema", None)
