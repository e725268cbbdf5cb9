"""What a client of completions and chat sees when the engine fails: before the first token, amid a stream, or for one
request alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import openai
import pytest

from foretell.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from foretell.server import sse
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import request, run
from tests.server.live import serving
from tests.server.scripted import ScriptedEngine

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 8, "ignore_eos": True, "allowed_token_ids": [65]},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "ignore_eos": True,
        "allowed_token_ids": [65],
    },
}
ERRORS = [
    (InvalidRequestError("no"), 400, "invalid_request_error"),
    (OverloadedError("full", 7.0), 429, "rate_limit_error"),
    (UnavailableError("lost"), 503, "overloaded_error"),
    (DeadlineError("late"), 408, "timeout_error"),
    (RuntimeError("a secret of ours"), 500, "server_error"),
]


class Breaking:
    """An engine that fails every request after so many updates."""

    def __init__(self, engine: LocalTextEngine, error: Exception, after: int) -> None:
        self.engine, self.error, self.after = engine, error, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def stream(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        left = self.after
        async with aclosing(self.engine.stream(*args, **options)) as updates:  # type: ignore[type-var]
            async for update in updates:
                if not left:
                    raise self.error
                left -= 1
                yield update


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind"), ERRORS)
def test_before_the_first_token_a_failure_has_its_status(
    tiny: LocalTextEngine, path: str, stream: bool, error: Exception, status: int, kind: str
) -> None:
    answer = request(Breaking(tiny, error, 0), "POST", path, json={**BODIES[path], "stream": stream})  # type: ignore[arg-type]
    assert answer.status_code == status
    told = answer.json()["error"]
    assert told["type"] == kind
    assert ("secret" in told["message"]) is False
    if status == 429:
        assert answer.headers["retry-after"] == "7"
    if status == 503:
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("error", "status", "kind"), ERRORS)
def test_amid_a_stream_it_is_an_error_event_and_no_done(
    tiny: LocalTextEngine, path: str, error: Exception, status: int, kind: str
) -> None:
    answer = request(Breaking(tiny, error, 3), "POST", path, json={**BODIES[path], "stream": True})  # type: ignore[arg-type]
    assert answer.status_code == 200
    *pieces, last, rest = answer.text.split("\n\n")
    assert rest == ""
    assert len(pieces) >= 3
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == kind
    assert "[DONE]" not in answer.text
    assert "secret" not in answer.text


def test_openais_client_raises_amid_a_stream(tiny: LocalTextEngine) -> None:
    engine: Any = Breaking(tiny, UnavailableError("the engine was lost"), 3)
    with serving(engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=tiny.about.model, messages=[{"role": "user", "content": "Hello"}], stream=True, max_tokens=8,
            extra_body={"allowed_token_ids": [65]},
        )  # fmt: skip
        with pytest.raises(openai.APIError, match="the engine was lost"):
            for _ in stream:
                pass


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_a_request_that_the_engine_gave_up_has_no_answer(
    tiny: LocalTextEngine, path: str, reason: str, status: int
) -> None:
    engine: Any = ScriptedEngine(tiny, ["some text"], reason=reason)
    assert request(engine, "POST", path, json=BODIES[path]).status_code == status
    streamed = request(engine, "POST", path, json={**BODIES[path], "stream": True})
    assert "[DONE]" not in streamed.text
    assert '"error"' in streamed.text


def test_one_of_many_prompts_that_fails_ends_the_others(tiny: LocalTextEngine) -> None:
    engine: Any = Breaking(tiny, UnavailableError("lost"), 2)
    body = {"prompt": ["a", "b", "c"], "max_tokens": 200, "ignore_eos": True}
    assert request(engine, "POST", "/v1/completions", json=body).status_code == 503
    assert tiny.unfinished == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_a_client_that_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch, leaves: bool) -> None:
    """Past its deadline and a grace, or when it hangs up: what makes the pieces is closed."""
    monkeypatch.setattr(sse, "GRACE_SECONDS", 0.01)
    closed = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
        finally:
            closed.append(True)

    async def receive() -> Any:
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def go() -> None:
        stream = sse.EventStream(pieces(), None if leaves else 0.01)
        await asyncio.wait_for(stream({"type": "http", "path": "/"}, receive, send), 30)

    run(go())
    assert closed == [True]
