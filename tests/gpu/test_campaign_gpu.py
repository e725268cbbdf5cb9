"""Thousands of random requests with preemptions and aborts: no NaN, no leak, the ledger holds."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams
from foretell.core.engine import Engine

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
KV_BYTES = 8 << 20  # 8 thousand tokens: room for an eighth of the sequences
REQUESTS = int(os.environ.get("FORETELL_CAMPAIGN", "10000"))
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4000, "hidden_size": 512,
    "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def test_random_requests_with_preemptions_and_aborts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    llm = LLM(
        str(tmp_path), load_format="dummy", device="cuda", max_num_seqs=200, max_num_batched_tokens=2048,
        max_model_len=2048, memory_share=0.5, kv_cache_bytes=KV_BYTES,
    )  # fmt: skip
    engine, rng = llm.assembly.engine, random.Random(1)
    shared = [[rng.randrange(4000) for _ in range(400)] for _ in range(4)]
    unfinished: dict[int, int] = {}
    counts = {"stop": 0, "length": 0, "abort": 0, "error": 0}
    try:
        call(llm, lambda e: drive(e, rng, shared, unfinished, counts))
        assert not unfinished
        assert counts["error"] == 0
        assert counts["abort"] > REQUESTS // 100
        assert engine.scheduler.preemptions_by_reason.get("kv_blocks_exhausted", 0) > 0
        assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
    finally:
        llm.close()


def call(llm: LLM, function: Any) -> None:
    llm.service.call(function).result()


def drive(
    engine: Engine, rng: random.Random, shared: list[list[int]], unfinished: dict[int, int], counts: dict[str, int]
) -> None:
    number = 0
    while number < REQUESTS or engine.has_work:
        for _ in range(rng.randrange(0, 24)):
            if number < REQUESTS and len(unfinished) < 500:
                own = [rng.randrange(4000) for _ in range(rng.randrange(1, 200))]
                prompt = rng.choice(shared)[: rng.randrange(0, 400)] + own
                sampled = rng.random() < 0.3
                params = SamplingParams(
                    temperature=0.9 if sampled else 0.0, seed=number if sampled else None,
                    top_p=rng.choice([1.0, 0.9]), top_k=rng.choice([0, 0, 50]), max_tokens=rng.randrange(1, 60),
                    eos_token_ids=(3,), repetition_penalty=1.1 if number % 97 == 0 else 1.0,
                )  # fmt: skip
                engine.add(10**9 + number, prompt, params)
                unfinished[10**9 + number] = 0
                number += 1
        for output in engine.step() if engine.has_work else []:
            if output.token_id is not None:
                assert 0 <= output.token_id < 4000
                unfinished[output.request_id] += 1
            if output.finish_reason is not None:
                del unfinished[output.request_id]
                counts[output.finish_reason] += 1
        if unfinished and rng.random() < 0.2:
            victim = rng.choice(list(unfinished))
            assert engine.finish(victim)
            del unfinished[victim]
            counts["abort"] += 1


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_ledger_is_within_two_percent_of_what_the_driver_says(tmp_path: Path, share: float) -> None:
    big = {**CONFIG, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128000,
           "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(big))
    with LLM(
        str(tmp_path), load_format="dummy", device="cuda", max_num_seqs=256, max_num_batched_tokens=8192,
        memory_share=share,
    ) as llm:  # fmt: skip
        ledger = llm.assembly.ledger
        assert ledger is not None
        wanted = [
            SamplingParams(temperature=0.9, seed=i, top_p=0.9, max_tokens=4, ignore_eos=True) for i in range(256)
        ]
        llm.generate([[i % 100 + j for j in range(300)] for i in range(256)], wanted, progress=False)
        free, total = torch.cuda.mem_get_info()
        print({k: round(v / 2**30, 2) for k, v in ledger.entries.items()}, (total - free) / 2**30)
        assert abs(total - free - ledger.planned_bytes) <= 0.02 * ledger.planned_bytes
        assert total - free <= 1.01 * ledger.budget_bytes
