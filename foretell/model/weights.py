"""Canonical weights on demand: read from a file and checked, or made up."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.errors import ModelFormatError
from foretell.model.families import tensor_naming
from foretell.model.gguf_adapter import gguf_architecture, gguf_naming
from foretell.model.naming import Naming, Source
from foretell.model.parameters import weight_shapes
from foretell.store.gguf_rows import QuantisedRows, quantised_rows
from foretell.store.tensors import TensorSource

Take = Callable[[Tensor], Tensor]


class Weights(Protocol):
    """What the builder reads from. A shard of the model is a Weights around a Weights."""

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        """The weight of this canonical name, for the caller to copy or keep, not to write to. ``take`` picks a part
        of it (a view): nothing else is read where the file allows."""
        ...

    def blocks(self, name: str) -> QuantisedRows | None:
        """The same as the file has it; None if it is not a quantised matrix of whole rows."""
        ...


def naming_of(source: TensorSource, spec: ModelSpec) -> Naming:
    """What the file calls the weights, by its format."""
    if source.format == "gguf":
        return gguf_naming(gguf_architecture(source.metadata), source.names())
    return tensor_naming(spec)


class FileWeights:
    """Weights of a tensor source. Names and shapes are checked at once, before anything is read."""

    def __init__(self, source: TensorSource, spec: ModelSpec) -> None:
        self.source = source
        self.shapes = weight_shapes(spec)
        names = set(source.names())
        naming = naming_of(source, spec)
        self.sources = naming.sources(spec, names)
        _check(self.sources, source, names, _ignored(naming, spec))
        # A fused tensor is asked for part by part, one after the other: each thread keeps the last one it read.
        self._kept = _Kept()

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        place = self.sources[name]
        if take is not None:
            return self._read_part(name, place, dtype, take)
        tensor = self._read_raw(place, dtype)
        if place.transform is not None:
            tensor = place.transform(tensor)
        assert tuple(tensor.shape) == self.shapes[name], f"{name}: the transform gave {tuple(tensor.shape)}"
        return tensor

    def _read_part(self, name: str, place: Source, dtype: torch.dtype, take: Take) -> Tensor:
        """Of a memory-mapped tensor only the part's pages are touched, unless a transform moves data about."""
        tensor = self.source.view(place.name)
        if tensor is None:
            tensor = self.source.read(place.name, dtype)
        if place.transform is not None:
            tensor = place.transform(tensor)
        part = take(tensor).to(dtype)
        if not torch.isfinite(part.sum(dtype=torch.float32)):
            raise not_finite(place.name)
        return part

    def blocks(self, name: str) -> QuantisedRows | None:
        place = self.sources[name]
        if place.transform is not None and not place.by_rows:
            return None
        rows = quantised_rows(self.source, place.name)
        if rows is None:
            return None
        if not rows.is_finite():
            raise not_finite(place.name)
        return rows if place.transform is None else replace(rows, raw=place.transform(rows.raw))

    def _read_raw(self, place: Source, dtype: torch.dtype) -> Tensor:
        last = self._kept.last
        if last is not None and last[:2] == (place.name, dtype):
            return last[2]
        self._kept.last = last = None  # let go of the former one first
        tensor = self.source.read(place.name, dtype)
        # A sum is not finite when any element is not, and costs one pass over memory.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise not_finite(place.name)
        if place.transform is not None:
            self._kept.last = (place.name, dtype, tensor)
        return tensor


def stack(parts: Sequence[Tensor]) -> Tensor:
    """The parts' rows in one tensor: no copy where they lie one behind the other already."""
    first = parts[0]
    if len(parts) == 1:
        return first
    memory, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for part in parts:
        alike = part.dtype is first.dtype and part.shape[1:] == first.shape[1:] and part.is_contiguous()
        if not alike or part.untyped_storage().data_ptr() != memory or part.data_ptr() != end:
            return torch.cat(list(parts))
        end += part.nbytes
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def not_finite(name: str) -> ModelFormatError:
    return ModelFormatError(f"tensor {name!r} holds NaN or infinite values; fetch the model again")


class _Kept(threading.local):
    last: tuple[str, torch.dtype, Tensor] | None = None


def _ignored(naming: Naming, spec: ModelSpec) -> re.Pattern[str]:
    """Tensors that may be there without being read; a tied head is the embedding, whatever the file adds."""
    patterns = list(naming.ignored)
    if spec.tied_embeddings:
        patterns.append(re.escape(naming.head) + r"\.weight")
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def _check(
    sources: dict[str, Source], source: TensorSource, names: Collection[str], ignored: re.Pattern[str]
) -> None:
    for place in sources.values():
        if place.name not in names:
            raise ModelFormatError(f"tensor {place.name!r} {list(place.shape)} is missing from the model files")
        found = tuple(source.shape(place.name))
        if found != place.shape:
            raise ModelFormatError(
                f"tensor {place.name!r} has shape {list(found)}, expected {list(place.shape)} by the model's config"
            )
    wanted = {place.name for place in sources.values()}
    unexpected = sorted(name for name in names if name not in wanted and not ignored.fullmatch(name))
    if unexpected:
        shape = list(source.shape(unexpected[0]))
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ModelFormatError(
            f"unexpected tensor {unexpected[0]!r} {shape}{more}: the model's config does not account for it"
        )


class DummyWeights:
    """Small random weights of the right shapes, for speed work: norms 1, biases 0, the rest within ±0.02·√3.

    One random block is repeated rather than drawn anew, so that billions of weights take seconds; every
    weight still has memory of its own once packed.
    """

    BLOCK = (1 << 20) + 7  # odd, so that repetitions do not align with rows

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.shapes = weight_shapes(spec)
        generator = torch.Generator().manual_seed(seed)
        self.block = (torch.rand(self.BLOCK, generator=generator) - 0.5) * (0.04 * 3**0.5)

    def blocks(self, name: str) -> QuantisedRows | None:
        return None

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        whole = self._whole(name, dtype)
        return whole if take is None else take(whole)

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self.shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=dtype)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype)
        size = torch.Size(shape).numel()
        start = hash_of(name) % self.BLOCK
        tensor = torch.empty(size, dtype=dtype)
        block = self.block.roll(-start).to(dtype)
        for begin in range(0, size, self.BLOCK):
            tensor[begin : begin + self.BLOCK] = block[: size - begin]
        return tensor.view(shape)


def hash_of(name: str) -> int:
    """A hash of the text that is the same in every process."""
    import zlib

    return zlib.crc32(name.encode())
