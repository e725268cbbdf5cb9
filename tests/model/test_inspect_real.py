"""`inspect` on real files, and its operation counts against the products that torch really carries out."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foretell.cost.operations import decode_flops, prefill_flops, score_flops
from foretell.inspection import inspect_model
from foretell.kernels.reference import ReferenceKernels
from foretell.model.families import resolve_spec
from foretell.model.load import load_dummy, resolve_dtype
from foretell.store import resolve
from tests.model.paged import PagedRunner
from tests.unit.test_inspect_numbers import GEMMA_270M, LLAMA_8B

SMALL: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS = {
    "MHA": LLAMA_8B | SMALL | {"num_key_value_heads": 4},
    "GQA": LLAMA_8B | SMALL | {"num_key_value_heads": 2},
    "MQA": LLAMA_8B | SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "sliding": GEMMA_270M | SMALL | {"sliding_window": 16, "sliding_window_pattern": 2},
}
BLOCK = 4


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CONFIGS[request.param]


def counted(runner: PagedRunner, tokens: list[int]) -> int:
    """Operations of one step, the head applied to its last token, as torch's own counter sees them."""
    ids = torch.tensor(tokens)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden = runner.model.forward(ids, runner.context([len(tokens)]), runner.kv)
        runner.model.logits(hidden[-1:])
    runner.lengths[0] += len(tokens)
    return int(counter.get_total_flops())


def test_torch_counts_the_same_operations(config: dict[str, Any]) -> None:
    """Decoding exactly; in a prefill the reference kernel also computes the pairs that the mask then hides."""
    spec = resolve_spec(config)
    model = load_dummy(spec, ReferenceKernels(), torch.float32)
    runner = PagedRunner(model, max_tokens=64, block_size=BLOCK)
    prompt = 31
    square = spec.num_layers * score_flops(spec, prompt * prompt)
    expected = prefill_flops(spec, prompt)
    assert counted(runner, list(range(prompt))) == expected.total - expected.attention_scores + square
    for length in (32, 33):
        read = sum(score_flops(spec, _keys_gathered(length, w)) for w in spec.windows)
        flops = decode_flops(spec, length)
        assert counted(runner, [7]) == flops.total - flops.attention_scores + read
        if length % BLOCK == 0 and "sliding_window" not in config:
            assert read == flops.attention_scores  # whole blocks: nothing is gathered for nothing


def _keys_gathered(length: int, window: int | None) -> int:
    """Keys the reference kernel multiplies in a decode step: whole blocks that touch the visible span."""
    span = length if window is None else min(length, window + BLOCK - 1)
    return -(-span // BLOCK) * BLOCK


@pytest.mark.parametrize(
    ("alias", "total", "kind", "stored"),
    [
        ("smollm2-135m", 134_515_008, "GQA", {"Q4_1", "Q8_0", "F32"}),
        ("gemma3-270m", 268_098_176, "MQA", {"Q5_0", "Q4_K", "Q6_K", "Q8_0", "F32"}),
    ],
)
def test_real_files(alias: str, total: int, kind: str, stored: set[str]) -> None:
    files = resolve(alias)
    seen = inspect_model(files)
    assert seen.counts.total == total == sum(part.parameters for part in seen.stored)
    assert seen.spec.attention_kind == kind
    assert {part.type for part in seen.stored} == stored
    assert 0 < files.size_bytes - sum(part.bytes for part in seen.stored) < 10_000_000  # header and vocabulary
    assert f"torch.{seen.dtype}" == str(resolve_dtype("auto", files))


def test_inspecting_a_gguf_imports_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['foretell', 'inspect', 'smollm2-135m', '--json']\nfrom foretell.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kv_cache"]["bytes_per_token"] == 23040
    assert seen["stored"]["file_bytes"] == 98_362_432
