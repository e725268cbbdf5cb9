"""GGUF metadata to specs: nothing in a damaged file may surface as anything but a one-line refusal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import ModelSpec
from foretell.errors import ModelFormatError, UnsupportedModelError
from foretell.model.gguf_adapter import gguf_spec
from foretell.model.naming import Source
from foretell.model.weights import naming_of

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma3", "phi3", "granite", "olmo2", "gpt2", "gptneox", "starcoder2",
                 "falcon"]  # fmt: skip


class HeaderOnly:
    """A GGUF source of which only the header is looked at."""

    format = "gguf"

    def __init__(self, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
        self.metadata, self.shapes = metadata, shapes

    def names(self) -> Sequence[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(self.shapes[name], dtype=dtype)


def header(architecture: str) -> dict[str, Any]:
    fields = {
        "block_count": 7,
        "context_length": 128,
        "embedding_length": 48,
        "feed_forward_length": 50,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    if architecture in ("gemma3", "phi3"):
        fields["attention.sliding_window"] = 16
    if architecture in ("gpt2", "gptneox"):
        fields["attention.head_count_kv"] = 6
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in fields.items()}


SCALARS = st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=6)
VALUES = SCALARS | st.lists(SCALARS, max_size=8) | st.sampled_from(["linear", "yarn", "none", "longrope"])
EXTRA = ["rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.dimension_count",
         "rope.scale_linear", "attention.key_length", "attention.value_length", "expert_count", "attention.scale",
         "attention.sliding_window_pattern", "rope.freq_base_swa", "use_parallel_residual",
         "attention.sliding_window"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(data=st.data(), architecture=st.sampled_from(ARCHITECTURES))
def test_any_metadata_gives_a_sound_spec_or_a_refusal(data: st.DataObject, architecture: str) -> None:
    metadata = header(architecture)
    keys = st.sampled_from(sorted({key.partition(".")[2] for key in metadata} | set(EXTRA)))
    for key, value in data.draw(st.dictionaries(keys, VALUES, max_size=5)).items():
        metadata[f"{architecture}.{key}"] = value
    for key in data.draw(st.sets(keys, max_size=2)):
        metadata.pop(f"{architecture}.{key}", None)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (67, 48)}
    if data.draw(st.booleans()):
        shapes["rope_freqs.weight"] = (data.draw(st.integers(1, 40)),)
    refusal: Exception | None = None
    try:
        spec = gguf_spec(HeaderOnly(metadata, shapes))
    except (ModelFormatError, UnsupportedModelError) as error:
        refusal = error
    assert refusal is None or "\n" not in str(refusal)
    if refusal is None:
        assert isinstance(spec, ModelSpec)
        assert spec.num_heads % spec.num_kv_heads == 0


def test_every_architecture_reads_and_names_every_weight() -> None:
    for architecture in ARCHITECTURES:
        source = HeaderOnly(header(architecture), {"token_embd.weight": (67, 48)})
        spec = gguf_spec(source)
        sources = naming_of(source, spec).sources(spec, source.names())
        assert all(isinstance(place, Source) for place in sources.values())
        assert "blk.6.ffn_down.weight" in {place.name for place in sources.values()}


def test_a_window_is_never_ignored() -> None:
    """Olmo 3 comes under Olmo 2's name, with windows that Olmo 2 has not."""
    source = HeaderOnly(header("olmo2") | {"olmo2.attention.sliding_window": 16}, {"token_embd.weight": (67, 48)})
    with pytest.raises(UnsupportedModelError, match=r"sliding_window.*gemma3, phi3"):
        gguf_spec(source)
    assert set(gguf_spec(HeaderOnly(header("olmo2"), {"token_embd.weight": (67, 48)})).windows) == {None}
