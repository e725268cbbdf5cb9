"""Rounding while loading: the blocks' linear layers and nothing else, or a refusal in one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foretell.config import ModelSpec, RopeSpec
from foretell.errors import ConfigError
from foretell.kernels.base import Linear
from foretell.kernels.formats import FORMATS
from foretell.kernels.reference import ReferenceKernels, ReferenceLinear
from foretell.model.load import load_dummy

SPEC = ModelSpec(
    family="llama", num_layers=2, hidden_size=48, intermediate_size=80, num_heads=4, num_kv_heads=2, head_dim=12,
    vocab_size=90, max_position_embeddings=64, windows=(None, None), rope=RopeSpec(10000.0, 12), attention_scale=0.3,
)  # fmt: skip


class Rounding(ReferenceKernels):
    """Layers of what the codes mean, in torch."""

    def quantise_linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear:
        kept_as = FORMATS[name]
        return ReferenceLinear(kept_as.dequantise(kept_as.quantise(weight), weight.shape[1]), bias)


@pytest.mark.parametrize("name", FORMATS)
def test_linear_layers_of_blocks_are_rounded_and_head_and_embedding_are_not(name: str) -> None:
    plain = load_dummy(SPEC, ReferenceKernels(), torch.float32)
    rounded = load_dummy(SPEC, Rounding(), torch.float32, quantization=name)
    assert rounded.weight_format == name
    for exact, block in zip(plain.blocks, rounded.blocks, strict=True):
        for layer, other in ((exact.attention.qkv, block.attention.qkv), (exact.mlp.down, block.mlp.down)):  # type: ignore[union-attr]
            assert isinstance(layer, ReferenceLinear)
            assert isinstance(other, ReferenceLinear)
            difference = (layer.weight - other.weight).norm() / layer.weight.norm()
            assert 1e-4 < difference < 0.15
    assert plain.head is not None
    assert rounded.head is not None
    assert torch.equal(plain.head.linear.weight, rounded.head.linear.weight)  # type: ignore[attr-defined]
    assert torch.equal(plain.embedding.tokens, rounded.embedding.tokens)  # type: ignore[union-attr, arg-type]


def test_kernels_without_such_layers_refuse_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^the reference kernels have no int8 layers: leave quantization out$"):
        load_dummy(SPEC, ReferenceKernels(), torch.float32, quantization="int8")
