"""POST /v1/completions, against what the engine itself says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foretell.core.params import SamplingParams
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from foretell.server.protocol.completions import CompletionChunk, CompletionResponse
from tests.server.client import request, run

GREEDY = {"temperature": 0, "max_tokens": 8}


def post(engine: LocalTextEngine, config: ServerConfig | None = None, **body: Any) -> Any:
    answer = request(engine, "POST", "/v1/completions", config, json={**GREEDY, **body})
    assert answer.status_code == 200, answer.text
    return CompletionResponse.model_validate(answer.json())


def refusal(engine: LocalTextEngine, config: ServerConfig | None = None, **body: Any) -> dict[str, Any]:
    answer = request(engine, "POST", "/v1/completions", config, json={"prompt": "Hi", **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def chunks(engine: LocalTextEngine, **body: Any) -> list[CompletionChunk]:
    answer = request(engine, "POST", "/v1/completions", json={**GREEDY, "stream": True, **body})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [CompletionChunk.model_validate(json.loads(e.removeprefix("data: "))) for e in events[:-2]]


def direct(engine: LocalTextEngine, prompt: Any, **params: Any) -> Any:
    return run(engine.llm.generate(prompt, SamplingParams(**{**GREEDY, **params})))


def test_the_text_is_the_engines(tiny: LocalTextEngine) -> None:
    made = post(tiny, prompt="Once upon")
    said = direct(tiny, "Once upon")
    assert made.choices[0].text == said.outputs[0].text
    assert made.choices[0].finish_reason == "length"
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (9, 8, 17)


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98], [[97, 98], [99]], ["abc", "d", "ef"]])
@pytest.mark.parametrize("n", [1, 2])
def test_streams_add_up_to_the_whole(tiny: LocalTextEngine, prompt: Any, n: int) -> None:
    options = {"prompt": prompt, "n": n, "seed": 3, "temperature": 1.0, "logprobs": 2, "echo": True}
    whole = post(tiny, **options)
    pieces = chunks(tiny, **options, stream_options={"include_usage": True})
    last = pieces.pop()
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    count = n * (len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1)
    assert [c.index for c in whole.choices] == list(range(count))
    for choice in whole.choices:
        mine = [c for p in pieces for c in p.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert choice.logprobs is not None
        for field in ("tokens", "text_offset", "token_logprobs"):
            joined = [x for c in mine if c.logprobs for x in getattr(c.logprobs, field)]
            assert joined == pytest.approx(getattr(choice.logprobs, field)) if field == "token_logprobs" else True
            assert field == "token_logprobs" or joined == getattr(choice.logprobs, field)


def test_logprobs_are_the_engines(tiny: LocalTextEngine) -> None:
    made = post(tiny, prompt="abc", logprobs=3, echo=True, prompt_logprobs=1).choices[0]
    said = direct(tiny, "abc", logprobs=3, prompt_logprobs=3)
    assert said.prompt_logprobs is not None
    assert made.logprobs is not None
    expected = [None] + [e.logprob for e in said.prompt_logprobs[1:]] + [e.logprob for e in said.outputs[0].logprobs]
    assert made.logprobs.token_logprobs == pytest.approx(expected)
    assert made.logprobs.tokens[:3] == ["a", "b", "c"]
    assert made.logprobs.text_offset[:4] == [0, 1, 2, 3]
    assert made.logprobs.top_logprobs[0] is None
    tops = [e.top for e in (*said.prompt_logprobs[1:], *said.outputs[0].logprobs)]
    for shown, top in zip(made.logprobs.top_logprobs[1:], tops, strict=True):
        assert shown is not None
        assert max(shown.values()) == pytest.approx(top[0][1])
        assert 3 <= len(shown) <= 4
    assert made.prompt_logprobs is not None
    assert made.prompt_logprobs[0] is None
    assert made.prompt_logprobs[1] is not None
    assert made.prompt_logprobs[1][str(ord("b") - 33)].decoded_token == "b"  # byte-level ids follow the alphabet


def test_a_prompt_alone_can_be_scored(tiny: LocalTextEngine) -> None:
    made = post(tiny, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert made.choices[0].text == "abc"
    assert made.choices[0].logprobs is not None
    assert len(made.choices[0].logprobs.tokens) == 3
    assert made.usage.completion_tokens == 0
    assert made.choices[0].finish_reason == "length"
    streamed = chunks(tiny, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert "".join(c.text for p in streamed for c in p.choices) == "abc"
    assert "needs echo" in refusal(tiny, max_tokens=0)["message"]


def test_stop_strings_and_their_reason(tiny: LocalTextEngine) -> None:
    text = direct(tiny, "Once upon", max_tokens=40).outputs[0].text
    stop = next(c for c in text[2:] if c.isascii() and c.isprintable())
    made = post(tiny, prompt="Once upon", stop=[stop], max_tokens=40).choices[0]
    assert made.text == text[: text.index(stop)]
    assert (made.finish_reason, made.stop_reason) == ("stop", stop)
    kept = post(tiny, prompt="Once upon", stop=stop, max_tokens=40, include_stop_str_in_output=True).choices[0]
    assert kept.text == text[: text.index(stop) + 1]


def test_the_same_seed_gives_the_same_text(tiny: LocalTextEngine) -> None:
    first, second, other = (post(tiny, prompt="x", temperature=1, seed=s).choices[0].text for s in (7, 7, 8))
    assert first == second != other


def test_token_ids_come_back_on_request(tiny: LocalTextEngine) -> None:
    said = direct(tiny, "abc")
    made = post(tiny, prompt="abc", return_token_ids=True, return_tokens_as_token_ids=True, logprobs=0).choices[0]
    assert made.token_ids == said.outputs[0].token_ids
    assert made.prompt_token_ids == said.prompt_token_ids
    assert made.logprobs is not None
    assert made.logprobs.tokens == [f"token_id:{i}" for i in said.outputs[0].token_ids]


def test_vllms_sampling_fields_reach_the_engine(tiny: LocalTextEngine) -> None:
    assert post(tiny, prompt="x", allowed_token_ids=[65]).choices[0].text == chr(65 + 33) * 8
    forced = post(tiny, prompt="x", logit_bias={"40": 100}).choices[0].text
    assert forced == chr(40 + 33) * 8
    biased = {"logit_bias": {"258": 100}}
    assert post(tiny, prompt="x", **biased).choices[0].finish_reason == "stop"
    assert post(tiny, prompt="x", ignore_eos=True, **biased).usage.completion_tokens == 8
    assert post(tiny, prompt="x", min_tokens=5, **biased).usage.completion_tokens >= 5
    stopped = post(tiny, prompt="x", stop_token_ids=[40], logit_bias={"40": 100}).choices[0]
    assert (stopped.text, stopped.stop_reason) == ("", 40)


def test_the_prefix_cache_shows_in_usage(tiny: LocalTextEngine) -> None:
    prompt = "a prefix that is used twice, " * 3
    post(tiny, prompt=prompt)
    again = post(tiny, prompt=prompt)
    assert again.usage.prompt_tokens_details.cached_tokens >= 64


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"best_of": 3}, "best_of"), ({"suffix": "end"}, "suffix"), ({"foo": 1}, "foo"), ({"n": 17}, "n"),
        ({"logprobs": 21}, "logprobs"), ({"prompt_logprobs": 999}, "prompt_logprobs"), ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 257}, "stop"), ({"stop": [""]}, "stop"), ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"), ({"top_p": 0}, "top_p"), ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1e30}, "max_tokens"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"), ({"prompt": [1, "a"]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["x"] * 129}, "prompt"), ({"prompt": [999999]}, "vocabulary"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"), ({"use_beam_search": True}, "use_beam_search"), ({"seed": 2**70}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"min_tokens": 50}, "min_tokens"), ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"), ({"request_id": "mine"}, "request_id"),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens"), ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"priority": 2**40}, "priority"), ({"model": 3}, "model"), ({"stream": "yes"}, "stream"),
        ({"prompt": ["x"] * 100, "n": 16}, "n"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(tiny: LocalTextEngine, body: dict[str, Any], word: str) -> None:
    error = refusal(tiny, **body)
    assert word in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_another_model_is_a_404(tiny: LocalTextEngine) -> None:
    answer = request(tiny, "POST", "/v1/completions", json={"prompt": "x", "model": "gpt-9"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
