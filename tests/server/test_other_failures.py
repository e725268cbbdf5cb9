"""What clients of /v1/responses and /v1/messages are told when the engine fails, before and amid an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import ErrorResponse
from openai.types.responses import ResponseFailedEvent

from foretell.errors import DeadlineError, OverloadedError, UnavailableError
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import request, run
from tests.server.instant import until
from tests.server.live import serving
from tests.server.scripted import ScriptedEngine
from tests.server.strict import strictly

BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "Hello", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
}


class Breaking:
    """An engine that fails every request after so many updates."""

    def __init__(self, engine: LocalTextEngine, error: Exception, after: int) -> None:
        self.engine, self.error, self.after = engine, error, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def stream(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        left = self.after
        if not left:
            raise self.error
        async with aclosing(self.engine.stream(*args, **options)) as updates:  # type: ignore[type-var]
            async for update in updates:
                if update.finish_reason is not None:
                    break  # a reader as slow as that got several tokens in one
                yield update
                left -= 1
                if not left:
                    break
        raise self.error


def ask(engine: Any, path: str, **more: Any) -> Any:
    return request(engine, "POST", path, json={"model": engine.about.model, **BODIES[path], **more})


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OverloadedError("the queue is full", 7.0), 429),
        (UnavailableError("the engine was lost"), 503),
        (DeadlineError("not finished within 1 s"), 408),
        (ZeroDivisionError("a defect"), 500),
    ],
)
def test_before_the_first_token_a_failure_has_its_status(
    tiny: LocalTextEngine, path: str, stream: bool, error: Exception, status: int
) -> None:
    answer = ask(Breaking(tiny, error, 0), path, stream=stream)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    message = answer.json()["error"]["message"]
    assert "a defect" not in message
    if status == 429:
        assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize("path", BODIES)
def test_amid_an_answer_that_is_not_streamed_it_still_has_its_status(tiny: LocalTextEngine, path: str) -> None:
    answer = ask(Breaking(tiny, UnavailableError("the engine was lost"), 3), path)
    assert answer.status_code == 503
    assert "the engine was lost" in answer.json()["error"]["message"]


def test_amid_a_stream_a_response_ends_as_failed(tiny: LocalTextEngine) -> None:
    answer = ask(Breaking(tiny, UnavailableError("the engine was lost"), 3), "/v1/responses", stream=True)
    assert answer.status_code == 200
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    last = strictly(ResponseFailedEvent, events[-1])
    assert last.response.error.message == "the engine was lost"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "[DONE]" not in answer.text


def test_amid_a_stream_a_message_ends_in_an_error_event(tiny: LocalTextEngine) -> None:
    answer = ask(Breaking(tiny, UnavailableError("the engine was lost"), 3), "/v1/messages", stream=True)
    *_, name, data, empty = answer.text.split("\n")[:-1]
    assert (name, empty) == ("event: error", "")
    error = strictly(ErrorResponse, json.loads(data[6:])).error
    assert (error.type, error.message) == ("overloaded_error", "the engine was lost")
    assert "message_stop" not in answer.text


def test_a_defect_of_ours_amid_a_stream_is_told_without_its_text(tiny: LocalTextEngine) -> None:
    for path in BODIES:
        answer = ask(Breaking(tiny, ZeroDivisionError("a defect"), 3), path, stream=True)
        assert answer.status_code == 200
        assert "the server failed on this request" in answer.text
        assert "a defect" not in answer.text


def test_the_clients_notice(tiny: LocalTextEngine) -> None:
    with serving(Breaking(tiny, UnavailableError("the engine was lost"), 3)) as url:  # type: ignore[arg-type]
        model = tiny.about.model
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            with client.responses.stream(model=model, input="Hello") as stream:
                kinds = [event.type for event in stream]
            assert kinds[-1] == "response.failed"
            with pytest.raises(openai.InternalServerError, match="the engine was lost"):
                client.responses.create(model=model, input="Hello")
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as other:
            asked: Any = {"model": model, **BODIES["/v1/messages"]}
            with (
                pytest.raises(anthropic.APIStatusError, match="the engine was lost") as caught,
                other.messages.stream(**asked) as messages,
            ):
                messages.get_final_message()
            assert caught.value.type == "overloaded_error"


@pytest.mark.parametrize("path", BODIES)
def test_a_deadline_of_its_own_ends_a_request(tiny: LocalTextEngine, path: str) -> None:
    answer = ask(tiny, path, timeout_seconds=0.0001)
    assert answer.status_code == 408
    assert "0.0001 s" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
def test_extras_reach_the_engine(tiny: LocalTextEngine, path: str) -> None:
    def answer(**more: Any) -> str:
        body = ask(tiny, path, **more).json()
        content = body["content"] if "content" in body else body["output"][0]["content"]
        text: str = content[0]["text"]
        return text

    assert answer(seed=7) == answer(seed=7) != answer(seed=8)
    assert answer(seed=7, top_k=1) == answer(seed=8, top_k=1)
    for name in ("chat_template", "messages", "bos_token"):
        refused = ask(tiny, path, chat_template_kwargs={name: "x"})
        assert refused.status_code == 400
        assert name in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_client_leaves(tiny: LocalTextEngine, path: str, stream: bool) -> None:
    engine: Any = ScriptedEngine(tiny, ["for ever " * 200_000], chars=1)

    async def go(base: str) -> None:
        async with httpx.AsyncClient(base_url=base, timeout=60) as client:
            body = {"model": tiny.about.model, **BODIES[path], "stream": stream}
            if stream:
                async with client.stream("POST", path, json=body) as leaving:
                    async for _ in leaving.aiter_lines():
                        break
            else:
                asked = asyncio.create_task(client.post(path, json=body))
                await until(lambda: bool(engine.prompts))
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: engine.abandoned == 1)

    with serving(engine) as base:
        run(go(base))
