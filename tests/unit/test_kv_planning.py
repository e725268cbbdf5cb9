"""KV blocks from bytes: within them, enough for every group, and nothing promised that cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretell.config import ModelSpec, SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.errors import ConfigError
from foretell.executor.virtual import LinearCost, VirtualExecutor
from foretell.worker.kv import block_bytes, plan_blocks

GEMMA = ModelSpec(
    family="gemma3", num_layers=18, hidden_size=640, intermediate_size=2048, num_heads=4, num_kv_heads=1,
    head_dim=256, vocab_size=262144, max_position_embeddings=32768, windows=((512,) * 5 + (None,)) * 3,
)  # fmt: skip
MISTRAL = replace(GEMMA, family="mistral", windows=(4096,) * 18)


def engine_for(spec: ModelSpec, config: SchedulerConfig, kv_bytes: int) -> Engine:
    counts = plan_blocks(spec, config, kv_bytes, 2)
    used = sum(n * size for n, size in zip(counts, block_bytes(spec, config.block_size, 2), strict=True))
    assert used <= kv_bytes
    return Engine(config, VirtualExecutor(LinearCost(), counts), [group.window for group in spec.kv_groups])


@given(
    st.sampled_from([GEMMA, MISTRAL, replace(GEMMA, windows=(None,) * 18)]),
    st.integers(10**4, 10**10),
    st.integers(2, 32768),
    st.integers(1, 64),
    st.sampled_from([1, 16, 2048]),
    st.sampled_from([1, 16, 32]),
)
def test_what_is_planned_runs(spec: ModelSpec, kv_bytes: int, length: int, seqs: int, budget: int, size: int) -> None:
    config = SchedulerConfig(max_model_len=length, max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=size)
    try:
        engine = engine_for(spec, config, kv_bytes)
    except ConfigError as error:
        assert "is too little" in str(error)  # noqa: PT017
        return
    prompt = [1] * min(40, engine.scheduler.max_tokens_per_request - 1)
    engine.add(0, prompt, SamplingParams(max_tokens=3))
    while engine.has_work:
        engine.step()


def test_a_small_cache_gives_a_sliding_model_chunks_and_company() -> None:
    """100 MB of Gemma 3 270M: in proportion to what all sequences at 32k would take, it was one-token chunks."""
    scheduler = engine_for(GEMMA, SchedulerConfig(max_model_len=32768), 100_000_000).scheduler
    assert scheduler.chunk_cap >= 2048
    assert scheduler.max_tokens_per_request >= 14_000


@pytest.mark.parametrize("seqs", [1, 4])
def test_a_window_wider_than_the_context_asks_for_the_context_only(seqs: int) -> None:
    config = SchedulerConfig(max_model_len=512, max_num_seqs=seqs, max_num_batched_tokens=512)
    assert engine_for(MISTRAL, config, 10**10).scheduler.chunk_cap == 512


def test_a_stage_without_layers_of_a_group_leaves_it_to_the_others() -> None:
    spec = ModelSpec("gemma3", 4, 8, 8, 2, 1, 8, 10, 4096, (16, 16, 16, None))
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)
    full, window = plan_blocks(spec, config, 1 << 20, 2, range(2))
    assert block_bytes(spec, config.block_size, 2, range(2))[0] == 0
    assert full == 4 * 256 // config.block_size  # as many as can be of use: they cost nothing here
    assert window >= 3
