"""What a user may choose is checked before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.errors import ConfigError
from foretell.options import EngineOptions, scheduler_config


def test_sequences_beyond_the_token_budget_are_refused_only_if_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs \(65\) is above max_num_batched_tokens \(64\)"):
        EngineOptions("m", max_num_seqs=65, max_num_batched_tokens=64)
    assert scheduler_config(EngineOptions("m", max_num_batched_tokens=16), 100).max_num_seqs == 16
    assert scheduler_config(EngineOptions("m"), 100).max_num_seqs == 64
    assert scheduler_config(EngineOptions("m", max_num_seqs=512), 100).max_num_seqs == 512


@pytest.mark.parametrize(
    "bad",
    [
        {"model": ""}, {"dtype": "int8"}, {"load_format": "pickle"}, {"max_num_seqs": 0}, {"max_num_seqs": 1.5},
        {"max_num_batched_tokens": 0}, {"block_size": -1}, {"starvation_turns": 0}, {"max_model_len": 0},
        {"kv_cache_bytes": -5}, {"num_threads": 0}, {"max_chunk_tokens": -1}, {"watermark": 1.0}, {"watermark": -0.1},
        {"watermark": float("nan")}, {"watermark": "1%"}, {"memory_share": None}, {"memory_share": 0}, {"seed": None},
        {"seed": 2**64}, {"block_size": True}, {"max_chunk_tokens": 2.5}, {"num_threads": 10**6}, {"policy": "best"},
        {"enable_prefix_caching": "no"}, {"batch_invariant": None}, {"device": "tpu"}, {"tp": 0}, {"step_log": 5},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions(**{"model": "m", **bad})
    assert next(iter(bad)) in str(caught.value)
    assert "\n" not in str(caught.value)
