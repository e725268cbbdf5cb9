"""Checkpoints onto a GPU: every weight as the CPU reads it, whatever the carriers; no more memory than it takes."""

from __future__ import annotations

import gc
import os
import random
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from foretell.errors import ModelFormatError
from foretell.kernels import get_kernels
from foretell.model import carriers, lanes
from foretell.model.build import Builder
from foretell.model.device_weights import DeviceFileWeights
from foretell.model.load import load_model, spec_for
from foretell.model.weights import FileWeights
from foretell.store import open_tensors, resolve
from tests.model.test_carriers import carrying, in_threads
from tests.model.test_load import CONFIG, write

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DEVICE = torch.device("cuda")
LARGER = CONFIG | {
    "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 12, "vocab_size": 3001,
    "n_embd": 256, "n_layer": 12, "n_head": 4,
}  # fmt: skip


@pytest.mark.parametrize(("count", "window"), [(12, 1 << 30), (8, 1 << 20), (5, 1)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_every_weight_as_the_cpu_reads_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    stored: torch.dtype,
    count: int,
    window: int,
) -> None:
    """Kernels on the default stream read memory that the next tensor gets as soon as it is let go of."""
    for module, name, value in (
        (lanes, "PIECE_BYTES", 100_000), (carriers, "CARRIERS", count), (carriers, "WINDOW_BYTES", window)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    write(tmp_path, LARGER | {"architectures": [architecture]}, stored)
    files = resolve(str(tmp_path))
    spec, kernels = spec_for(files), get_kernels("reference")
    plain = FileWeights(open_tensors(files), spec)
    for seed in range(3):
        weights = DeviceFileWeights(open_tensors(files), spec, DEVICE)
        names = list(plain.shapes) if not seed else random.Random(seed).sample(list(plain.shapes), len(plain.shapes))

        def read(mine: list[str], weights: DeviceFileWeights = weights) -> list[torch.Tensor]:
            busy = torch.ones(4096, 4096, device=DEVICE)
            for _ in range(20):
                busy = busy @ busy * 1e-4
            return [weights.read(name, torch.bfloat16) for name in mine]

        with closing(weights):
            if seed < 2:
                weights.start(Builder(spec, weights, kernels, torch.bfloat16).reads(), torch.bfloat16)
            found = in_threads([partial(read, names[number::4]) for number in range(4)])
            weights.check()
        for number, tensors in enumerate(found):
            for name, tensor in zip(names[number::4], tensors, strict=True):
                assert torch.equal(tensor.cpu(), plain.read(name, torch.bfloat16)), name
        assert not carrying()


def test_no_more_memory_than_the_weights_take(tmp_path: Path) -> None:
    write(tmp_path, LARGER | {"hidden_size": 1024, "head_dim": 256, "intermediate_size": 3072}, torch.bfloat16)
    files = resolve(str(tmp_path))
    spec, kernels = spec_for(files), get_kernels(device="cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(files, spec, kernels, torch.bfloat16, activation_dtype=torch.bfloat16, device=DEVICE)
    assert torch.cuda.max_memory_allocated() - before < model.weight_bytes + (4 << 20)


@pytest.mark.parametrize("what", ["nan", "short"])
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, what: str) -> None:
    from safetensors.torch import save_file

    state, path = write(tmp_path, LARGER, torch.bfloat16), tmp_path / "model.safetensors"
    if what == "nan":
        state["model.layers.7.mlp.up_proj.weight"][-1, -1] = float("nan")
        save_file(state, path)
    files = resolve(str(tmp_path))
    spec, source = spec_for(files), open_tensors(files)
    if what == "short":
        os.truncate(path, path.stat().st_size // 2)
    said = r"layers\.7\.mlp\.up_proj\.weight' holds NaN" if what == "nan" else "ends in the middle of a tensor"
    with pytest.raises(ModelFormatError, match=said):
        load_model(source, spec, get_kernels(device="cuda"), torch.bfloat16, device=DEVICE)
    assert not carrying()
