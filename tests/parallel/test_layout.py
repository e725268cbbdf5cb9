"""Layouts: what is possible, what each rank holds, and that the shards are the model, no more and no less."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretell.config import ModelSpec
from foretell.errors import ConfigError
from foretell.model.parameters import weight_shapes
from foretell.model.weights import DummyWeights
from foretell.parallel.layout import (
    balanced_stages,
    in_flight,
    make_layout,
    possible_layouts,
    rank_parameters,
    shard_spec,
)
from foretell.parallel.shard import Cut, ShardedWeights


def spec_of(
    heads: int, kv_heads: int, *, layers: int = 4, ffn: int = 341, vocab: int = 101, **more: object
) -> ModelSpec:
    fields: dict[str, object] = {
        "family": "llama",
        "num_layers": layers,
        "hidden_size": 24,
        "intermediate_size": ffn,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": 8,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "windows": (None,) * layers,
        **more,
    }
    return ModelSpec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "pp", "reason"),
    [
        (9, 3, 2, 1, "9 query heads do not divide over 2 ranks"),
        (12, 4, 3, 1, "4 key/value heads neither divide over 3 ranks nor 3 over them"),
        (8, 8, 2, 5, "4 layers do not make 5 stages"),
        (8, 8, 0, 1, "whole numbers"),
    ],
)
def test_an_impossible_split_is_refused_with_the_possible_ones(
    heads: int, kv_heads: int, tp: int, pp: int, reason: str
) -> None:
    """Which TP (vllm#4232)? What cannot be is refused before anything is loaded, and what can be is listed."""
    with pytest.raises(ConfigError, match=reason) as caught:
        make_layout(spec_of(heads, kv_heads), tp, pp)
    assert "tp=1 pp=2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_possible_layouts_are_those_that_can_be_made() -> None:
    spec = spec_of(9, 3)
    for tp in range(1, 10):
        for pp in range(1, 6):
            if tp * pp > 9:
                continue
            if (tp, pp) in possible_layouts(spec, 9):
                make_layout(spec, tp, pp)
            else:
                with pytest.raises(ConfigError):
                    make_layout(spec, tp, pp)


def test_mqa_keeps_its_one_key_value_head_on_every_rank() -> None:
    shard = shard_spec(spec_of(4, 1), 4)
    assert (shard.num_heads, shard.num_kv_heads, shard.attention_kind) == (1, 1, "MHA")


@given(layers=st.integers(1, 40), pp=st.integers(1, 12), vocab=st.integers(10, 20000))
def test_stages_are_all_layers_in_order_none_empty_and_as_even_as_the_head_allows(
    layers: int, pp: int, vocab: int
) -> None:
    if pp > layers:
        return
    stages = balanced_stages(spec_of(3, 3, layers=layers, vocab=vocab), pp)
    assert [layer for stage in stages for layer in stage] == list(range(layers))
    counts = [len(stage) for stage in stages]
    assert min(counts) >= 1
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1
    assert counts[-1] <= max(counts[:-1], default=counts[-1])  # it has the head besides


def test_a_heavy_head_makes_the_last_stage_short() -> None:
    light = balanced_stages(spec_of(3, 3, layers=12, vocab=10), 2)
    heavy = balanced_stages(spec_of(3, 3, layers=12, vocab=5000), 2)
    assert len(light[1]) == 6
    assert len(heavy[1]) == 4  # the head is worth 4.5 layers


SPECS = [
    (spec_of(9, 3), (1, 3, 9)),
    (spec_of(8, 8, ffn=64, qkv_bias=True, o_bias=True, mlp_bias=True, gated_mlp=False), (2, 4)),
    (spec_of(4, 1, qk_norm="full"), (2, 4)),
    (spec_of(4, 2, qk_norm="head", lm_head_bias=True), (2, 4)),
]


@pytest.mark.parametrize(("spec", "tps"), SPECS)
def test_the_shards_together_are_the_weights(spec: ModelSpec, tps: tuple[int, ...]) -> None:
    """Every element of every weight is on some rank, in its place; what is added is zero."""
    whole = DummyWeights(spec, 0)
    for tp in tps:
        shards = [ShardedWeights(whole, spec, tp, rank) for rank in range(tp)]
        for name, shape in weight_shapes(shard_spec(spec, tp)).items():
            parts = [shard.read(name, torch.float32) for shard in shards]
            assert all(tuple(part.shape) == shape for part in parts), name
            expected = whole.read(name, torch.float32)
            cut = shards[0].cut(name)
            if cut == "whole":
                assert all(torch.equal(part, expected) for part in parts)
            elif cut == "once":
                assert torch.equal(torch.stack(parts).sum(0), expected)
            else:
                assert isinstance(cut, Cut)
                if name.rsplit(".", 1)[0].endswith((".k", ".v", "k_norm")) and tp > spec.num_kv_heads:
                    distinct = parts[:: tp // spec.num_kv_heads]  # the rest are replicas
                else:
                    distinct = parts
                joined = torch.cat(distinct, dim=cut.dim)
                size = expected.shape[cut.dim]
                assert torch.equal(joined.narrow(cut.dim, 0, size), expected), name
                assert not joined.narrow(cut.dim, size, joined.shape[cut.dim] - size).any()


@given(
    heads=st.sampled_from([(8, 8), (8, 2), (8, 1), (6, 3)]),
    tp=st.sampled_from([1, 2, 3, 4]),
    pp=st.integers(1, 4),
    tied=st.booleans(),
)
@settings(max_examples=60)
def test_the_ledger_counts_what_the_ranks_read(heads: tuple[int, int], tp: int, pp: int, tied: bool) -> None:
    spec = spec_of(*heads, tied_embeddings=tied)
    if (tp, pp) not in possible_layouts(spec, 16):
        return
    layout = make_layout(spec, tp, pp)
    shapes = weight_shapes(shard_spec(spec, tp))
    for rank, counted in enumerate(rank_parameters(spec, layout)):
        place = layout.place(rank)
        held = 0
        for name, shape in shapes.items():
            if name.startswith("layers."):
                held += prod(shape) * (int(name.split(".")[1]) in place.layers)
            elif name.startswith("embedding."):
                held += prod(shape) * (place.is_first + (place.is_last and tied))
            else:
                held += prod(shape) * place.is_last
        assert counted == held


def test_batches_in_flight() -> None:
    assert [in_flight(pp, "cpu") for pp in (1, 2, 4)] == [(1, 0), (2, 0), (4, 0)]
    assert [in_flight(pp, "cuda") for pp in (1, 2, 4)] == [(2, 1), (3, 0), (5, 0)]
