"""The engine on a GPU, end to end: tokens of transformers, whatever the batch; nothing leaks, nothing is NaN."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from foretell import LLM, SamplingParams

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
VOCAB = 3000
SHAPES: dict[str, dict[str, Any]] = {
    "llama-gqa-64": {"kind": "Llama", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "llama-mha-80": {"kind": "Llama", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 80},
    "llama-mqa-128": {"kind": "Llama", "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128},
    "qwen3": {"kind": "Qwen3", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128},
    "qwen2": {"kind": "Qwen2", "num_attention_heads": 8, "num_key_value_heads": 2},
    "gemma3": {
        "kind": "Gemma3", "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "sliding_window": 24, "query_pre_attn_scalar": 256,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp(request.param)
    return path, write_random_model(request.param, path)


def write_random_model(name: str, path: Path) -> Any:
    """The model in transformers, float32, on the GPU."""
    import transformers

    shape = dict(SHAPES[name])
    kind = shape.pop("kind")
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, max_position_embeddings=2048,
        initializer_range=0.08, **{"num_hidden_layers": 4, **shape},
    )  # fmt: skip
    torch.manual_seed(5)
    oracle = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    oracle.save_pretrained(path, safe_serialization=True)
    return oracle.to("cuda")


def prompts(count: int, longest: int = 300) -> list[list[int]]:
    rng = random.Random(count)
    stem = [rng.randrange(VOCAB) for _ in range(64)]
    found = []
    for i in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest))]
        found.append(stem[: 16 * (i % 5)] + own)
    return found


@torch.inference_mode()
def oracle_gaps(oracle: Any, prompt: list[int], tokens: list[int]) -> list[float]:
    """By how much transformers prefers its own next token to ours, at each of our tokens."""
    ids = torch.tensor([prompt + tokens], device="cuda")
    logits = oracle(ids).logits[0, len(prompt) - 1 : -1].float()
    ours = logits.gather(1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
    return (logits.max(dim=-1).values - ours).tolist()


def options(**changed: Any) -> dict[str, Any]:
    return {
        "device": "cuda", "dtype": "float32", "max_num_seqs": 40, "max_num_batched_tokens": 256,
        "kv_cache_bytes": 64 << 20, "max_model_len": 1024, **changed,
    }  # fmt: skip


def test_greedy_float32_tokens_are_those_of_transformers(model: tuple[Path, Any]) -> None:
    path, oracle = model
    wanted = [SamplingParams(temperature=0, max_tokens=(8, 24, 40)[i % 3], ignore_eos=True) for i in range(40)]
    with LLM(str(path), **options()) as llm:
        outputs = llm.generate(prompts(40), wanted, progress=False)
        alone = llm.generate(prompts(40)[3], wanted[3], progress=False)[0]
        for prompt, output in zip(prompts(40), outputs, strict=True):
            assert output.outputs[0].error is None
            assert max(oracle_gaps(oracle, prompt, list(output.outputs[0].token_ids))) < 2e-3
        assert alone.outputs[0].token_ids == outputs[3].outputs[0].token_ids
        pools = llm.assembly.engine.scheduler.blocks.pools
        assert all(pool.num_free == pool.num_blocks for pool in pools)


def test_bfloat16_stays_close_to_float32(model: tuple[Path, Any]) -> None:
    path, oracle = model
    wanted = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    with LLM(str(path), **options(dtype="bfloat16")) as llm:
        outputs = llm.generate(prompts(24), wanted, progress=False)
    gaps = [
        gap
        for prompt, output in zip(prompts(24), outputs, strict=True)
        for gap in oracle_gaps(oracle, prompt, list(output.outputs[0].token_ids))
    ]
    assert sum(gaps) / len(gaps) < 0.02
    assert max(gaps) < 0.6


def test_seeded_sampling_and_logprobs_equal_the_cpus(model: tuple[Path, Any]) -> None:
    path, _ = model
    wanted = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=2, max_tokens=12, top_p=0.8, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=12, top_k=20, min_p=0.01, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=4, max_tokens=12, repetition_penalty=1.2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=12, logit_bias={7: 3.0}, ignore_eos=True),
    ]
    found = []
    for device in ("cpu", "cuda"):
        with LLM(str(path), **options(device=device)) as llm:
            found.append(llm.generate(prompts(6), wanted, progress=False))
    for cpu, gpu in zip(*found, strict=True):
        assert cpu.outputs[0].token_ids == gpu.outputs[0].token_ids
        for one, other in zip(cpu.outputs[0].logprobs or (), gpu.outputs[0].logprobs or (), strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        for one, other in zip(cpu.prompt_logprobs or (), gpu.prompt_logprobs or (), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
