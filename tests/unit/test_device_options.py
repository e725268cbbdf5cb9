"""Which device, which defaults, and what the ledger leaves to the cache."""

from __future__ import annotations

import pytest
import torch

from foretell.errors import ConfigError
from foretell.options import EngineOptions, resolve_device, scheduler_config
from foretell.worker.ledger import MemoryLedger


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused_in_one_line() -> None:
    assert resolve_device(EngineOptions(model="m")) == "cpu"
    with pytest.raises(ConfigError, match="torch sees no GPU here"):
        resolve_device(EngineOptions(model="m", device="cuda"))


def test_impossible_devices_and_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is unknown"):
        EngineOptions(model="m", device="tpu")
    for share in (0.0, -1.0, 1.01):
        with pytest.raises(ConfigError, match="memory_share"):
            EngineOptions(model="m", memory_share=share)
    with pytest.raises(ConfigError, match="admission_batch"):
        EngineOptions(model="m", admission_batch=0)


@pytest.mark.parametrize(
    ("option", "value"), [("quantization", "int8"), ("quantization", "fp8"), ("kv_cache_dtype", "fp8")]
)
def test_fewer_bits_are_refused_on_a_cpu_in_one_line(option: str, value: str) -> None:
    options = EngineOptions(model="m", device="cpu", **{option: value})
    with pytest.raises(ConfigError, match=f"^{option}='{value}' needs a GPU: [^\n]*$"):
        resolve_device(options)
    with pytest.raises(ConfigError, match=f"{option} 'int3' is unknown: choose one of"):
        EngineOptions(model="m", **{option: "int3"})


def test_a_gpu_takes_more_sequences_and_tokens_unless_told_otherwise() -> None:
    cpu, gpu = (scheduler_config(EngineOptions(model="m"), 4096, device) for device in ("cpu", "cuda"))
    assert (cpu.max_num_seqs, cpu.max_num_batched_tokens, cpu.admission_batch) == (64, 512, 1)
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens, gpu.admission_batch) == (256, 8192, 8)
    own = EngineOptions(model="m", max_num_seqs=7, max_num_batched_tokens=100, admission_batch=2)
    told = scheduler_config(own, 4096, "cuda")
    assert (told.max_num_seqs, told.max_num_batched_tokens, told.admission_batch) == (7, 100, 2)
    assert scheduler_config(EngineOptions(model="m", max_num_seqs=9000), 4096, "cuda").max_num_batched_tokens == 9000


def test_where_nobody_watches_a_gpu_takes_prompts_first_in_larger_steps() -> None:
    batch = EngineOptions(model="m", interactive=False)
    gpu, cpu, served = (
        scheduler_config(options, 4096, device)
        for options, device in ((batch, "cuda"), (batch, "cpu"), (EngineOptions(model="m"), "cuda"))
    )
    assert (gpu.policy, gpu.max_num_batched_tokens) == ("prefill-first", 16384)
    assert scheduler_config(batch, 4096, "cuda", 80 << 30).max_num_batched_tokens == 32768
    assert scheduler_config(EngineOptions(model="m"), 4096, "cuda", 80 << 30).max_num_batched_tokens == 8192
    assert (cpu.policy, cpu.max_num_batched_tokens) == ("mixed", 512)
    assert (served.policy, served.max_num_batched_tokens) == ("mixed", 8192)
    told = scheduler_config(EngineOptions(model="m", interactive=False, policy="mixed"), 4096, "cuda")
    assert told.policy == "mixed"


def test_the_ledger_gives_the_cache_what_is_left_and_refuses_what_is_not_there() -> None:
    ledger = MemoryLedger(1000 << 20, 0.5, {"weights": 300 << 20, "activations": 100 << 20})
    assert ledger.left_for_kv(None) == 100 << 20
    assert ledger.left_for_kv(40 << 20) == 40 << 20
    with pytest.raises(ConfigError, match=r"weights 0\.29"):
        ledger.left_for_kv(101 << 20)
    ledger.entries["graphs"] = 100 << 20
    with pytest.raises(ConfigError, match="lower max_num_batched_tokens"):
        ledger.left_for_kv(None)
