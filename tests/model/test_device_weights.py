"""Weights for a device, with the CPU as the device: the same model, only what is read, and no threads left behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foretell.errors import ConfigError, ModelFormatError
from foretell.kernels.base import Linear
from foretell.kernels.reference import ReferenceKernels
from foretell.model import carriers, lanes
from foretell.model.build import Builder
from foretell.model.device_weights import DeviceFileWeights
from foretell.model.families import FAMILIES
from foretell.model.lanes import Piece
from foretell.model.load import build_from, spec_for
from foretell.model.transformer import Transformer
from foretell.model.weights import FileWeights, stack
from foretell.store import open_tensors, resolve
from tests.model.paged import one_thread, prompt_logits
from tests.model.test_carriers import carrying, in_threads
from tests.model.test_load import CONFIG, KERNELS, PROMPT, WatchedSource, load, write

CPU = torch.device("cpu")
EVERY_FAMILY = CONFIG | {
    "n_embd": 32, "n_layer": 3, "n_head": 4, "sliding_window": None, "head_dim": 8,
    "layer_types": ["full_attention"] * 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lanes, "PIECE_BYTES", 1000)
    monkeypatch.setattr(carriers, "WINDOW_BYTES", 20_000)
    with one_thread():
        yield
    assert not carrying()


def weights_of(folder: Path) -> DeviceFileWeights:
    files = resolve(str(folder))
    return DeviceFileWeights(open_tensors(files), spec_for(files), CPU)


def built(weights: DeviceFileWeights, folder: Path, threads: int = 1, **options: Any) -> Transformer:
    """The model, by so many builder threads."""
    spec, before = spec_for(resolve(str(folder))), torch.get_num_threads()
    builder = Builder(spec, weights, options.pop("kernels", KERNELS), torch.float32, **options)
    torch.set_num_threads(threads)
    try:
        return build_from(weights, builder)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [family.architectures[0] for family in FAMILIES])
def test_the_model_is_the_one_that_is_read_at_once(tmp_path: Path, architecture: str, stored: torch.dtype) -> None:
    write(tmp_path, EVERY_FAMILY | {"architectures": [architecture]}, stored)
    wanted = prompt_logits(load(tmp_path), PROMPT)
    for threads in (1, 4):
        model = built(weights_of(tmp_path), tmp_path, threads)
        assert torch.equal(prompt_logits(model, PROMPT), wanted)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM"])
def test_reads_in_any_order_without_a_word_before(tmp_path: Path, architecture: str) -> None:
    """Fused tensors are asked for part by part, by different threads too."""
    write(tmp_path, EVERY_FAMILY | {"architectures": [architecture]})
    weights = weights_of(tmp_path)
    plain = FileWeights(open_tensors(resolve(str(tmp_path))), spec_for(resolve(str(tmp_path))))
    names = random.Random(1).sample(list(plain.shapes), len(plain.shapes))

    def read(mine: list[str]) -> list[bool]:
        return [torch.equal(weights.read(n, torch.float32), plain.read(n, torch.float32)) for n in mine]

    with closing(weights):
        found = in_threads([partial(read, names[number::3]) for number in range(3)])
        weights.check()
    assert found == [[True] * len(names[number::3]) for number in range(3)]


def test_a_stage_carries_what_it_reads_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = write(tmp_path, CONFIG)
    read, seen = lanes.read, set()

    def noted(piece: Piece, view: memoryview) -> None:
        seen.add((piece.parcel.path, piece.parcel.offset))
        read(piece, view)

    monkeypatch.setattr(lanes, "read", noted)
    weights = weights_of(tmp_path)
    built(weights, tmp_path, layers=range(1, 3))
    place = weights.source.place  # type: ignore[attr-defined]
    others = ("model.embed_tokens.", "model.layers.0.")
    assert seen == {place(name)[:2] for name in state if not name.startswith(others)}


def test_what_a_product_stacks_lies_together_if_it_is_stored_as_it_is_kept(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, torch.bfloat16)
    for dtype, together in ((torch.bfloat16, True), (torch.float32, False)):
        weights = weights_of(tmp_path)
        builder = Builder(spec_for(resolve(str(tmp_path))), weights, KERNELS, dtype)
        groups = builder.reads()
        assert sorted(name for group in groups for name in group) == sorted(weights.shapes)
        stacked = [group for group in groups if len(group) > 1]
        assert len(stacked) == 2 * 3
        with closing(weights):
            weights.start(groups, dtype)
            for group in stacked:
                parts = [weights.read(name, dtype) for name in group]
                assert (stack(parts).data_ptr() == parts[0].data_ptr()) is together


def test_a_part_alone(tmp_path: Path) -> None:
    state = write(tmp_path, CONFIG)
    with closing(weights_of(tmp_path)) as weights:
        part = weights.read("layers.1.mlp.up.weight", torch.float32, lambda tensor: tensor[8:24])
        assert torch.equal(part, state["model.layers.1.mlp.up_proj.weight"][8:24])


def test_other_sources_are_read_as_ever(tmp_path: Path) -> None:
    state = write(tmp_path, CONFIG)
    spec, source = spec_for(resolve(str(tmp_path))), WatchedSource(state)
    model = built(DeviceFileWeights(source, spec, CPU), tmp_path)
    assert torch.equal(prompt_logits(model, PROMPT), prompt_logits(load(tmp_path), PROMPT))
    del model
    assert source.alive == 0


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_is_said_by_tensor(tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    state = write(tmp_path, CONFIG)
    state[name].view(-1)[-1] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match=f"'{name}' holds NaN"):
        built(weights_of(tmp_path), tmp_path)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_cut_short_ends_the_load(tmp_path: Path, threads: int) -> None:
    write(tmp_path, CONFIG)
    weights, path = weights_of(tmp_path), tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ModelFormatError, match=r"^model\.safetensors ends in the middle of a tensor"):
        built(weights, tmp_path, threads)


class Failing(ReferenceKernels):
    """Takes some layers and then no more."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        self.left -= 1
        if self.left < 0:
            raise ConfigError("enough")
        return super().pack_linear(weight, bias)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("left", [0, 5])
def test_a_builder_that_fails_leaves_no_threads(tmp_path: Path, threads: int, left: int) -> None:
    write(tmp_path, CONFIG)
    with pytest.raises(ConfigError, match="enough"):
        built(weights_of(tmp_path), tmp_path, threads, kernels=Failing(left))
