"""From canonical weights to the tensors of a file: names, layouts, and how to take one out of the other.

Free of torch: the transforms are tensor methods, applied later by the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foretell.config import ModelSpec
from foretell.model.parameters import weight_shapes

if TYPE_CHECKING:
    from torch import Tensor

Transform = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where one canonical weight comes from: a tensor of this name and shape, then a transform (or none).

    ``by_rows``: the transform only picks or reorders rows, whatever they hold, quantised blocks as well.
    """

    name: str
    shape: tuple[int, ...]
    transform: Transform | None = None
    by_rows: bool = False


# (spec, canonical part such as "attention.q", "weight" or "bias", canonical shape) → source, name unprefixed
Maker = Callable[[ModelSpec, str, str, tuple[int, ...]], Source]


@dataclass(frozen=True)
class Naming:
    """How one architecture's files call things. Keys are canonical; values names or makers of sources."""

    top: Mapping[str, str | Maker]
    parts: Mapping[str, str | Maker]
    layer: str = "layers.{}."
    head: str = "lm_head"
    roots: tuple[str, ...] = ("model.", "")  # prefixes in use for all but the head; the first that fits counts
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that hold no parameters

    def root(self, names: Collection[str]) -> str:
        first = self.layer.format(0)
        return next((r for r in self.roots if any(n.startswith(r + first) for n in names)), self.roots[0])

    def sources(self, spec: ModelSpec, names: Collection[str]) -> dict[str, Source]:
        """Canonical name → source for every weight of the spec, given the names in the file."""
        root = self.root(names)
        sources = {key: self._source(spec, root, key, shape) for key, shape in weight_shapes(spec).items()}
        table, head = sources["embedding.weight"], f"{self.head}.weight"
        if spec.tied_embeddings and table.name not in names and head in names:
            sources["embedding.weight"] = replace(table, name=head)  # of a tied pair either name may be stored
        return sources

    def _source(self, spec: ModelSpec, root: str, key: str, shape: tuple[int, ...]) -> Source:
        part, kind = key.rsplit(".", 1)
        if part == "lm_head":
            return Source(f"{self.head}.{kind}", shape)
        prefix = root
        if part.startswith("layers."):
            _, layer, part = part.split(".", 2)
            prefix += self.layer.format(layer)
        target = self.parts[part] if part in self.parts else self.top[part]
        if isinstance(target, str):
            return Source(f"{prefix}{target}.{kind}", shape)
        made = target(spec, part, kind, shape)
        return replace(made, name=prefix + made.name)


def plus_one(name: str) -> Maker:
    """Gemma keeps w - 1 of its norms: the model multiplies by 1 + w."""
    return lambda spec, part, kind, shape: Source(f"{name}.{kind}", shape, lambda t: t + 1.0)


def transposed(name: str) -> Maker:
    """GPT-2's Conv1D keeps [in, out]."""

    def make(spec: ModelSpec, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        if kind == "bias":
            return Source(f"{name}.{kind}", shape)
        return Source(f"{name}.{kind}", shape[::-1], lambda t: t.t())

    return make


def _qkv_rows(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return {"attention.q": (0, q), "attention.k": (q, q + kv), "attention.v": (q + kv, q + 2 * kv)}


def stacked_qkv(name: str, *, conv1d: bool = False) -> Maker:
    """One tensor with the rows of q, then k, then v; conv1d: columns instead of rows."""

    def make(spec: ModelSpec, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        rows = _qkv_rows(spec)
        start, stop = rows[part]
        total = (rows["attention.v"][1], *shape[1:])
        if conv1d and kind == "weight":
            return Source(f"{name}.{kind}", total[::-1], lambda t: t[:, start:stop].t())
        return Source(f"{name}.{kind}", total, lambda t: t[start:stop], by_rows=True)

    return make


def grouped_qkv(name: str) -> Maker:
    """One tensor, KV head by KV head: the rows of its query heads, then its key, then its value.

    GPT-NeoX (q, k, v of head 0, of head 1 …) and all three Falcon layouts are this one rule.
    """

    def make(spec: ModelSpec, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        groups, queries = spec.num_kv_heads, spec.query_heads_per_kv_head
        start, stop = {
            "attention.q": (0, queries),
            "attention.k": (queries, queries + 1),
            "attention.v": (queries + 1, queries + 2),
        }[part]
        total = (groups * (queries + 2) * spec.head_dim, *shape[1:])

        def take(t: Tensor) -> Tensor:
            return t.reshape(groups, queries + 2, spec.head_dim, *shape[1:])[:, start:stop].reshape(shape)

        return Source(f"{name}.{kind}", total, take)

    return make


def stacked_gate_up(name: str) -> Maker:
    """One tensor with the rows of gate, then up."""

    def make(spec: ModelSpec, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        ffn = spec.intermediate_size
        start = 0 if part == "mlp.gate" else ffn
        return Source(f"{name}.{kind}", (2 * ffn, *shape[1:]), lambda t: t[start : start + ffn], by_rows=True)

    return make


def interleaved_rows(name: str) -> Maker:
    """llama.cpp reorders the rows of each head of q and k so that rotary pairs are neighbours; undo it."""

    def make(spec: ModelSpec, part: str, kind: str, shape: tuple[int, ...]) -> Source:
        half = spec.head_dim // 2

        def restore(t: Tensor) -> Tensor:
            return t.reshape(-1, half, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)

        return Source(f"{name}.{kind}", shape, restore, by_rows=True)

    return make
