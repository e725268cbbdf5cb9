"""What a weight file looks like to the loader, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class TensorSource(Protocol):
    """Named tensors that are read one at a time (memory-mapped), so that a rank can take only its shard."""

    format: str  # "safetensors", "gguf" or "dummy"
    metadata: Mapping[str, Any]  # GGUF key/values; {} for safetensors

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major torch shape: [out_features, in_features] for a linear weight. KeyError if absent."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor, dequantised if need be, as a fresh or memory-mapped tensor of this dtype."""
        ...

    def view(self, name: str) -> Tensor | None:
        """The tensor memory-mapped, in whatever float dtype it is stored; None where it must be dequantised."""
        ...
