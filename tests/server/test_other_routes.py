"""Tokenising, metrics, admin: the routes around generating."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from foretell.server.app import create_app
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import client_for, request, run

KEY, ADMIN = "sk-0123456789", "sk-of-the-admin"


def test_tokenize_and_back(tiny: LocalTextEngine) -> None:
    made = request(tiny, "POST", "/tokenize", json={"prompt": "héllo", "return_token_strs": True}).json()
    assert tiny.tokenizer is not None
    assert made["tokens"] == tiny.tokenizer.encode("héllo")
    assert made["count"] == 6
    assert made["max_model_len"] == tiny.about.max_model_len
    assert len(made["token_strs"]) == 6
    back = request(tiny, "POST", "/detokenize", json={"tokens": made["tokens"]}).json()
    assert back == {"prompt": "héllo"}
    assert request(tiny, "POST", "/detokenize", json={"tokens": [257]}).json()["prompt"] == "<|im_start|>"
    assert request(tiny, "POST", "/detokenize", json={"tokens": [9999]}).status_code == 400


def test_tokenize_messages(tiny: LocalTextEngine) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    made = request(tiny, "POST", "/tokenize", json={"messages": messages}).json()
    assert made["tokens"] == tiny.llm.llm.chat_token_ids(messages)
    bare = request(tiny, "POST", "/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
    assert made["tokens"][: bare["count"]] == bare["tokens"]
    for body in ({}, {"prompt": "x", "messages": messages}):
        assert "either a prompt or messages" in request(tiny, "POST", "/tokenize", json=body).text


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_metrics_count_what_happened(tiny: LocalTextEngine) -> None:
    """Against the answers' own figures; names are vLLM's under our prefix."""
    config = ServerConfig(served_model_names=("tiny",))

    async def go() -> tuple[dict[str, float], list[Any], dict[str, float]]:
        async with client_for(tiny, config) as client:
            before = samples((await client.get("/metrics")).text)
            body = {"prompt": "a fresh prompt for the metrics", "max_tokens": 5, "n": 2, "ignore_eos": True}
            answers = [(await client.post("/v1/completions", json=body)).json() for _ in range(3)]
            await client.post("/v1/completions", json={"prompt": "x", "temperature": -1})
            scraped = await client.get("/metrics")
            assert scraped.headers["content-type"].startswith("text/plain; version=0.0.4")
            return before, answers, samples(scraped.text)

    before, answers, after = run(go())
    usages = [a["usage"] for a in answers]
    label = '{model_name="tiny"}'
    assert after[f"foretell:request_prompt_tokens_sum{label}"] == sum(u["prompt_tokens"] for u in usages)
    assert after[f"foretell:request_generation_tokens_sum{label}"] == 30
    assert after['foretell:request_success_total{finished_reason="length",model_name="tiny"}'] == 6
    assert after[f"foretell:time_to_first_token_seconds_count{label}"] == 3
    assert after[f"foretell:inter_token_latency_seconds_count{label}"] == 6 * 4
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert after[f"foretell:{name}_seconds_count{label}"] == 3
    whole = after[f"foretell:e2e_request_latency_seconds_sum{label}"]
    parts = [after[f"foretell:request_{p}_time_seconds_sum{label}"] for p in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(whole)
    assert after['foretell:http_requests_total{status="200"}'] >= 4
    assert after['foretell:http_requests_total{status="400"}'] == 1
    grown = {name: after[name] - before[name] for name in after if name.endswith(label) and name in before}
    assert grown[f"foretell:generation_tokens_total{label}"] == 30
    assert grown[f"foretell:prefix_cache_hits_total{label}"] > 0
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"foretell:{name}{label}" in after
    assert "process_open_fds" in after


def test_two_applications_count_apart(tiny: LocalTextEngine) -> None:
    first, second = create_app(tiny), create_app(tiny)
    transport = httpx.ASGITransport(app=first)

    async def go() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            await client.get("/version")

    run(go())
    counted = [re.findall(rb"http_requests_total.*", a.state.server.metrics.text()) for a in (first, second)]
    assert counted[0]
    assert not [line for line in counted[1] if b"status=" in line]


def test_the_policy_is_switched_while_it_runs(tiny: LocalTextEngine) -> None:
    config = ServerConfig(api_keys=(KEY,), admin_api_keys=(ADMIN,))
    admin = {"authorization": f"Bearer {ADMIN}"}
    for policy in ("prefill-first", "decode-first", "mixed"):
        answer = request(tiny, "POST", "/admin/policy", config, headers=admin, json={"policy": policy})
        assert answer.json() == {"policy": policy}
        stats = request(tiny, "GET", "/admin/stats", config, headers=admin).json()["stats"]
        assert stats["policy"] == policy
    wrong = request(tiny, "POST", "/admin/policy", config, headers=admin, json={"policy": "fastest"})
    assert wrong.status_code == 400


def test_step_records_come_on_request(tiny: LocalTextEngine) -> None:
    config = ServerConfig(api_keys=(KEY,))
    headers = {"authorization": f"Bearer {KEY}"}

    def steps(keep: int) -> list[dict[str, Any]]:
        answer = request(tiny, "POST", "/admin/steps", config, headers=headers, json={"keep": keep})
        assert answer.status_code == 200
        return answer.json()["steps"]  # type: ignore[no-any-return]

    steps(64)
    body = {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
    assert request(tiny, "POST", "/v1/completions", config, headers=headers, json=body).status_code == 200
    records = steps(0)
    assert [r["chunks"][0]["phase"] for r in records] == ["prefill", "decode", "decode", "decode"]
    assert steps(0) == []


def test_admin_routes_need_a_key_that_is_theirs(tiny: LocalTextEngine) -> None:
    body = {"policy": "mixed"}

    def status(config: ServerConfig, key: str | None) -> int:
        headers = {} if key is None else {"x-api-key": key}
        return request(tiny, "POST", "/admin/policy", config, headers=headers, json=body).status_code

    assert status(ServerConfig(), None) == 403  # no key configured: nobody, not even from this machine
    assert status(ServerConfig(), KEY) == 403
    assert status(ServerConfig(api_keys=(KEY,)), KEY) == 200
    both = ServerConfig(api_keys=(KEY,), admin_api_keys=(ADMIN,))
    assert status(both, KEY) == 403
    assert status(both, ADMIN) == 200
    assert status(both, None) == 401
    assert status(ServerConfig(admin_api_keys=(ADMIN,)), ADMIN) == 200
    assert status(ServerConfig(admin_api_keys=(ADMIN,)), KEY) == 403
