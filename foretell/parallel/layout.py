"""Which rank holds what: tensor-parallel shares of a layer, pipeline stages of layers. No torch.

Rank = stage · tp + shard. A shard is described by a ``ModelSpec`` of its own (fewer heads, a narrower MLP, a part
of the vocabulary), so that the loader, the KV cache and the model need not know that there are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from foretell.config import ModelSpec
from foretell.errors import ConfigError
from foretell.model.parameters import layer_weight_shapes, weight_shapes

MAX_RANKS = 1024


@dataclass(frozen=True, slots=True)
class Layout:
    """``tp`` ranks share every layer, ``pp`` stages share the layers; ``stages`` are their ranges of layers."""

    tp: int
    pp: int
    stages: tuple[range, ...]

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def place(self, rank: int) -> Place:
        stage, shard = divmod(rank, self.tp)
        return Place(rank, stage, shard, self.stages[stage], stage == 0, stage == self.pp - 1)


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place in a layout."""

    rank: int
    stage: int
    shard: int
    layers: range
    is_first: bool
    is_last: bool

    def __str__(self) -> str:
        return f"rank {self.rank} (stage {self.stage}, shard {self.shard})"


def in_flight(pp: int, device: str) -> tuple[int, int]:
    """(batches in flight, sampled tokens of a request that may be outstanding when its next is planned). A token
    travels to the first stage with the next batch; where there is one stage of GPUs, they have it already. On GPUs a
    pipeline has a batch more than stages, so that the first one computes while the driver plans: two more were no
    faster on two H200s, for each batch is smaller."""
    if device == "cpu":
        return pp, 0
    return (2, 1) if pp == 1 else (pp + 1, 0)


def make_layout(spec: ModelSpec, tp: int, pp: int) -> Layout:
    """The layout, or ConfigError that says why there is none and which there are."""
    reason = refusal(spec, tp, pp)
    if reason:
        possible = ", ".join(f"tp={t} pp={p}" for t, p in possible_layouts(spec, max(8, tp * pp)))
        raise ConfigError(f"tp={tp} pp={pp} is impossible for this model: {reason}; possible up to "
                          f"{max(8, tp * pp)} ranks: {possible}")  # fmt: skip
    return Layout(tp, pp, balanced_stages(spec, pp))


def refusal(spec: ModelSpec, tp: int, pp: int) -> str:
    """Why the model cannot be split so; "" if it can."""
    if tp < 1 or pp < 1:
        return "tp and pp are whole numbers ≥ 1"
    if tp * pp > MAX_RANKS:
        return f"{tp * pp} ranks are more than {MAX_RANKS}"
    if pp > spec.num_layers:
        return f"{spec.num_layers} layers do not make {pp} stages"
    if spec.num_heads % tp:
        return f"{spec.num_heads} query heads do not divide over {tp} ranks"
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads:
        return f"{spec.num_kv_heads} key/value heads neither divide over {tp} ranks nor {tp} over them"
    return ""


def possible_layouts(spec: ModelSpec, max_ranks: int) -> list[tuple[int, int]]:
    """All (tp, pp) up to so many ranks, most tensor parallelism last within a number of ranks."""
    found = [
        (tp, ranks // tp)
        for ranks in range(1, max_ranks + 1)
        for tp in range(1, ranks + 1)
        if ranks % tp == 0 and not refusal(spec, tp, ranks // tp)
    ]
    return found


def balanced_stages(spec: ModelSpec, pp: int) -> tuple[range, ...]:
    """Consecutive layers such that the dearest stage is as cheap as can be. A layer costs its weights, and the
    last stage has the head besides; the embedding is a look-up and costs nothing. The head may outweigh all layers
    that the last stage could have: then it has one."""
    if pp == 1:
        return (range(spec.num_layers),)
    layer = sum(prod(shape) for shape in layer_weight_shapes(spec).values())
    head = spec.vocab_size * spec.hidden_size

    def counts(last: int) -> tuple[int, ...]:
        others = spec.num_layers - last
        return (*(others // (pp - 1) + (i < others % (pp - 1)) for i in range(pp - 1)), last)

    def dearest(last: int) -> int:
        return max(last * layer + head, counts(last)[0] * layer)

    chosen = counts(min(range(1, spec.num_layers - pp + 2), key=lambda last: (dearest(last), -last)))
    starts = [sum(chosen[:i]) for i in range(pp)]
    return tuple(range(start, start + count) for start, count in zip(starts, chosen, strict=True))


def shard_spec(spec: ModelSpec, tp: int) -> ModelSpec:
    """What one tensor-parallel rank holds of each layer. Key/value heads are replicated where there are fewer than
    ranks (MQA); MLP width and vocabulary are rounded up, the surplus being zeros."""
    if tp == 1:
        return spec
    return replace(
        spec,
        num_heads=spec.num_heads // tp,
        num_kv_heads=max(1, spec.num_kv_heads // tp),
        intermediate_size=-(-spec.intermediate_size // tp),
        vocab_size=-(-spec.vocab_size // tp),
    )


def rank_parameters(spec: ModelSpec, layout: Layout) -> tuple[int, ...]:
    """Parameters that each rank holds, replicas and padding included: its share of the byte ledger is this times the
    bytes of an element. A tied embedding is on the first stage and, as the head, on the last."""
    shapes = weight_shapes(shard_spec(spec, layout.tp))
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    embedding = sizes["embedding.weight"] + sizes.get("positions.weight", 0)
    ends = sum(size for name, size in sizes.items() if name.startswith(("final_norm.", "lm_head.")))
    head = sizes["embedding.weight"] if spec.tied_embeddings else 0
    counts: list[int] = []
    for rank in range(layout.num_ranks):
        place = layout.place(rank)
        count = layer * len(place.layers) + embedding * place.is_first + (ends + head) * place.is_last
        counts.append(count)
    return tuple(counts)


def stage_kv_groups(spec: ModelSpec, layers: Sequence[int]) -> tuple[int, ...]:
    """How many of these layers lie in each of the whole model's KV groups."""
    return tuple(sum(layer in layers for layer in group.layers) for group in spec.kv_groups)
