"""Which weights an architecture has and how large they are: from the spec alone, without torch.

The canonical names below are the loader's vocabulary: every file format maps onto them, and the counts
that `inspect` prints are sums over the same table, so they cannot differ from what is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from foretell.config import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def layer_prefix(layer: int) -> str:
    return f"layers.{layer}."


def weight_shapes(spec: ModelSpec) -> Shapes:
    """Canonical name → row-major shape of every weight ([out_features, in_features] for a linear one).

    A tied head is not listed: it is ``embedding.weight`` read a second time.
    """
    shapes: Shapes = {"embedding.weight": (spec.vocab_size, spec.hidden_size)}
    if spec.learned_positions:
        shapes["positions.weight"] = (spec.learned_positions, spec.hidden_size)
    for layer in range(spec.num_layers):
        prefix = layer_prefix(layer)
        shapes.update((prefix + name, shape) for name, shape in layer_weight_shapes(spec).items())
    shapes.update(_norm("final_norm", spec.hidden_size, spec))
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    if spec.lm_head_bias:
        shapes["lm_head.bias"] = (spec.vocab_size,)
    return shapes


def layer_weight_shapes(spec: ModelSpec) -> Shapes:
    """One layer's share of ``weight_shapes``, without the ``layers.N.`` prefix; all layers are alike."""
    h, ffn = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: Shapes = {}
    for name in layer_norm_names(spec):
        shapes.update(_norm(name, h, spec))
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes.update(_linear(f"attention.{name}", rows, h, spec.qkv_bias))
    if spec.qk_norm != "none":
        per_head = spec.qk_norm == "head"
        shapes["attention.q_norm.weight"] = (spec.head_dim if per_head else q,)
        shapes["attention.k_norm.weight"] = (spec.head_dim if per_head else kv,)
    shapes.update(_linear("attention.o", h, q, spec.o_bias))
    for name in ("gate", "up") if spec.gated_mlp else ("up",):
        shapes.update(_linear(f"mlp.{name}", ffn, h, spec.mlp_bias))
    shapes.update(_linear("mlp.down", h, ffn, spec.mlp_bias))
    return shapes


def layer_norm_names(spec: ModelSpec) -> tuple[str, ...]:
    """The block's own norms: before the halves (pre), behind them (post) or both (sandwich)."""
    names: list[str] = []
    if spec.norm_placement in ("pre", "sandwich"):
        names += ["attention_norm"] if spec.shared_block_norm else ["attention_norm", "mlp_norm"]
    if spec.norm_placement in ("post", "sandwich"):
        names += ["attention_post_norm", "mlp_post_norm"]
    return tuple(names)


STACKED = (("attention.k.", "attention.q."), ("attention.v.", "attention.q."), ("mlp.up.", "mlp.gate."))


def stacked_names(names: Iterable[str]) -> list[list[str]]:
    """Weights in the order given, those whose rows become one product's together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        first = name
        for part, before in STACKED:
            first = first.replace(part, before)
        groups.setdefault(first, []).append(name)
    return list(groups.values())


def _linear(name: str, rows: int, columns: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _norm(name: str, width: int, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    if spec.norm_bias:
        yield f"{name}.bias", (width,)


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Exact numbers of parameters; ``layer`` is one layer by component, all layers being alike."""

    embedding: int
    positions: int
    layer: dict[str, int]
    num_layers: int
    final_norm: int
    head: int  # 0 when tied: the head then is the embedding

    @property
    def per_layer(self) -> int:
        return sum(self.layer.values())

    @property
    def total(self) -> int:
        layers = self.per_layer * self.num_layers
        return self.embedding + self.positions + layers + self.final_norm + self.head


COMPONENTS = {
    "attention.q": ("attention.q.weight",),
    "attention.k": ("attention.k.weight",),
    "attention.v": ("attention.v.weight",),
    "attention.o": ("attention.o.weight",),
    "attention.biases": tuple(f"attention.{part}.bias" for part in "qkvo"),
    "attention.qk_norms": ("attention.q_norm.weight", "attention.k_norm.weight"),
    "mlp.gate": ("mlp.gate.weight",),
    "mlp.up": ("mlp.up.weight",),
    "mlp.down": ("mlp.down.weight",),
    "mlp.biases": ("mlp.gate.bias", "mlp.up.bias", "mlp.down.bias"),
}


def count_parameters(spec: ModelSpec) -> ParameterCounts:
    """Every parameter, counted once (a tied head is the embedding), by component."""
    sizes = {name: prod(shape) for name, shape in weight_shapes(spec).items()}
    one_layer = {name: prod(shape) for name, shape in layer_weight_shapes(spec).items()}
    layer = {part: sum(one_layer.get(n, 0) for n in names) for part, names in COMPONENTS.items()}
    layer["norms"] = sum(one_layer.values()) - sum(layer.values())
    return ParameterCounts(
        embedding=sizes["embedding.weight"],
        positions=sizes.get("positions.weight", 0),
        layer={part: size for part, size in layer.items() if size},
        num_layers=spec.num_layers,
        final_norm=sum(size for name, size in sizes.items() if name.startswith("final_norm.")),
        head=sum(size for name, size in sizes.items() if name.startswith("lm_head.")),
    )


@dataclass(frozen=True, slots=True)
class ParameterEstimate:
    """The back-of-the-envelope count, with the arithmetic that a reader can follow."""

    attention_per_layer: int
    mlp_per_layer: int
    embeddings: int
    total: int
    twelve_h_squared: int  # 12·h²·L, the rule of thumb
    explanation: str


def estimate_parameters(spec: ModelSpec) -> ParameterEstimate:
    """Matrices only: attention 2·h·q + 2·h·kv, MLP 2 or 3 times h·ffn, embeddings vocab·h.

    With MHA of q = kv = h and a plain MLP of ffn = 4h (GPT-2), or a gated one of ffn = 8h/3 (Llama 1), this
    is 4h² + 8h² = 12h² a layer, the rule in Kaplan et al. 2020 ("Scaling laws", table 1); GQA makes
    kv smaller than h and most MLPs differ from 8h², which is what the general form takes in.
    """
    h, ffn, layers = spec.hidden_size, spec.intermediate_size, spec.num_layers
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    matrices = 3 if spec.gated_mlp else 2
    attention = 2 * h * q + 2 * h * kv
    mlp = matrices * h * ffn
    tables = 1 if spec.tied_embeddings else 2
    embeddings = tables * spec.vocab_size * h + spec.learned_positions * h
    head = "tied: one table" if spec.tied_embeddings else "embedding and head"
    explanation = (
        f"per layer: attention 2·h·q + 2·h·kv = 2·{h}·{q} + 2·{h}·{kv} = {attention:,}, "
        f"MLP {matrices}·h·ffn = {matrices}·{h}·{ffn} = {mlp:,}; times {layers} layers; "
        f"plus vocabulary {tables}·{spec.vocab_size}·{h} ({head}). "
        f"Rule of thumb 12·h²·L = {12 * h * h * layers:,} without embeddings"
    )
    return ParameterEstimate(
        attention_per_layer=attention,
        mlp_per_layer=mlp,
        embeddings=embeddings,
        total=(attention + mlp) * layers + embeddings,
        twelve_h_squared=12 * h * h * layers,
        explanation=explanation,
    )
