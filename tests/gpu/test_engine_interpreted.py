"""The whole GPU path without a GPU: Triton's interpreter runs the kernels on the CPU, the tokens are the reference's.

TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_engine_interpreted.py
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from foretell.config import SchedulerConfig
from foretell.core.engine import Engine
from foretell.core.params import SamplingParams
from foretell.executor.overlapped import OverlappedExecutor
from foretell.kernels.base import Kernels
from foretell.kernels.cuda import CudaKernels
from foretell.kernels.reference import ReferenceKernels
from foretell.model.load import load_model, spec_for
from foretell.store import resolve
from foretell.worker.device_runner import DeviceRunner
from foretell.worker.kv import allocate

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
VOCAB, BLOCKS, CPU = 500, 30, torch.device("cpu")


@pytest.fixture(scope="module", params=["Llama", "Gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    common = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "max_position_embeddings": 256,
        "num_attention_heads": 4, "initializer_range": 0.08,
    }  # fmt: skip
    if request.param == "Llama":
        config = transformers.LlamaConfig(**common, num_hidden_layers=2, num_key_value_heads=2, head_dim=32)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Gemma3TextConfig(
            **common, num_hidden_layers=2, num_key_value_heads=1, head_dim=32, sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        model = transformers.Gemma3ForCausalLM(config)
    folder = tmp_path_factory.mktemp(request.param)
    model.float().save_pretrained(folder)
    return folder


def tokens(path: Path, kernels: Kernels) -> dict[int, list[int | None]]:
    """Prompts cut into chunks that share steps with decodes, in a cache full of NaN."""
    files, rng = resolve(str(path)), random.Random(0)
    spec = spec_for(files)
    model = load_model(files, spec, kernels, torch.float32)
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=40, max_model_len=128)
    groups = len(spec.kv_groups)
    kv = allocate(spec, (BLOCKS + 1,) * groups, config.block_size, torch.float32)
    for layer in kv:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    runner = DeviceRunner(model, kv, config, (BLOCKS,) * groups, CPU)
    model.reserve(config.max_model_len, CPU)
    engine = Engine(config, OverlappedExecutor(runner, (BLOCKS,) * groups), [g.window for g in spec.kv_groups])
    for i, length in enumerate((7, 33, 70)):
        prompt = [rng.randrange(VOCAB) for _ in range(length)]
        engine.add(i, prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    found: dict[int, list[int | None]] = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found.setdefault(output.request_id, []).append(output.token_id)
    return found


def test_interpreted_kernels_give_the_tokens_of_the_reference(path: Path) -> None:
    assert tokens(path, CudaKernels()) == tokens(path, ReferenceKernels())
