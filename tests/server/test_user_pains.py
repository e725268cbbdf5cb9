"""What hurts users of other engines most: one test for each pain. Hung workers and orphans (test_supervisor), clients
that left and the queue (test_security_record), leaks (test_campaigns) stand where their part is tested."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from foretell.assembly import EngineOptions
from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.errors import ConfigError, ForetellError
from foretell.executor.virtual import LinearCost, VirtualExecutor
from foretell.server.engine_client import EngineClient
from tests.server.client import client_for, request, run
from tests.server.tiny import start_tiny, tiny_folder

START = """
import sys
from foretell.llm import LLM
from foretell.core.params import SamplingParams
with LLM(sys.argv[1], load_format="dummy", dtype="float32", kv_cache_bytes=1 << 20) as llm:
    llm.generate([1, 2, 3], SamplingParams(max_tokens=2))
    print(sorted(llm.assembly.phases), "torch._inductor.codecache" in sys.modules, "triton" in sys.modules)
"""


def test_vllm_19824_a_start_compiles_no_model_and_every_phase_is_timed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START, str(tiny_folder())], capture_output=True, text=True, timeout=300
    )
    phases, inductor, triton = done.stdout.rpartition("]")[0], *done.stdout.split()[-2:]
    assert (inductor, triton) == ("False", "False"), done.stdout + done.stderr
    for phase in ("resolve", "tokenizer", "import torch", "kernels", "weights"):
        assert repr(phase) in phases


def test_vllm_2248_sglang_4330_14942_what_is_admitted_never_runs_out_of_memory() -> None:
    """Room for a few sequences, and twelve come at once: each gets all of its tokens, some after a preemption."""
    engine = start_tiny(kv_cache_bytes=1 << 19, enable_prefix_caching=False)
    bodies = [{"prompt": [i + 1] * 40, "max_tokens": 300, "ignore_eos": True, "temperature": 0} for i in range(12)]

    async def go() -> list[Any]:
        async with client_for(engine) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [(a.status_code, a.json()) for a in answers]

    try:
        tokens = engine.llm.llm.assembly.kv_tokens
        assert 340 <= tokens < 12 * 340 / 2
        answers = run(go())
        assert [status for status, _ in answers] == [200] * 12
        assert all(answer["usage"]["completion_tokens"] == 300 for _, answer in answers)
        metrics = request(engine, "GET", "/metrics").text
    finally:
        engine.close()
    assert "num_preemptions_total{model_name=" in metrics
    assert 'reason="kv_blocks_exhausted"' in metrics


def test_vllm_2248_a_cache_too_small_for_anything_is_refused_before_it_is_allocated() -> None:
    with pytest.raises(ConfigError, match="kv_cache_bytes") as caught:
        start_tiny(kv_cache_bytes=1000)
    assert "\n" not in str(caught.value)


def test_vllm_17618_an_engine_that_cannot_start_gives_the_cause_itself() -> None:
    """One line, through the process boundary, and no "see above"."""

    async def start(**options: Any) -> str:
        client = EngineClient(EngineOptions(str(tiny_folder()), **options))
        with pytest.raises(ForetellError) as caught:
            await client.start()
        await client.close()
        return str(caught.value)

    assert "no weights" in run(start())
    message = run(start(load_format="dummy", max_model_len=10**6))
    assert "beyond the model's context" in message
    assert "\n" not in message


def test_vllm_21495_a_long_prompt_holds_nobody_up() -> None:
    """While a prompt of 4,000 tokens comes in, every step goes on with all who decode, and no step is longer than
    the token budget."""
    records: list[dict[str, Any]] = []
    config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=8192)
    engine = Engine(config, VirtualExecutor(LinearCost(), (2048,)), on_step=records.append)
    for i in range(8):
        engine.add(i, [i + 1] * 8, SamplingParams(max_tokens=200))
    while len(records) < 5:
        engine.step()
    engine.add(100, [9] * 4000, SamplingParams(max_tokens=1))
    while engine.has_work:
        engine.step()
    busy = [r for r in records if any(c["request"] == 100 for c in r["chunks"])]
    assert len(busy) >= 4000 / 256
    for record in busy:
        assert record["tokens"] <= 256
        assert {c["request"] for c in record["chunks"]} >= set(range(8))


def test_vllm_18115_a_full_cache_slows_down_and_does_not_collapse() -> None:
    """Three times as many as fit: what is computed twice stays a small part of the work."""
    records: list[dict[str, Any]] = []
    config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=512)
    engine = Engine(config, VirtualExecutor(LinearCost(), (400,)), on_step=records.append)
    for i in range(60):
        engine.add(i, [i + 1] * 120, SamplingParams(max_tokens=200, ignore_eos=True))
    while engine.has_work:
        engine.step()
    preempted = sum(engine.scheduler.preemptions_by_reason.values())
    assert preempted > 0, "the cache was never full"
    useful = 60 * (120 + 199)
    assert sum(r["tokens"] for r in records) < 1.5 * useful


def test_vllm_51187_a_batch_invariant_engine_answers_the_same_to_the_last_bit() -> None:
    engine = start_tiny(batch_invariant=True, enable_prefix_caching=False, dtype="bfloat16", max_num_seqs=64)
    body = {"prompt": "The same question", "max_tokens": 12, "temperature": 0, "logprobs": 2}

    async def go(company: int) -> Any:
        async with client_for(engine) as client:
            others = [
                client.post(
                    "/v1/completions", json={**body, "prompt": "x" * (3 * i + 1), "seed": i, "temperature": 1}
                )
                for i in range(company)
            ]
            answer, *_ = await asyncio.gather(client.post("/v1/completions", json=body), *others)
            return answer.json()["choices"]

    try:
        alone = run(go(0))
        assert all(run(go(company)) == alone for company in (1, 12, 40))
    finally:
        engine.close()
