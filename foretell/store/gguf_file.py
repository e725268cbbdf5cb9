"""A GGUF file as a TensorSource: memory-mapped, dequantised one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import ModelFormatError
from foretell.store.gguf_header import GGML_TYPES, GGUFTensor, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

_BLOCKS: Final = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}


class GGUFSource:
    """Named tensors of one GGUF file; names and metadata are GGUF's own (``blk.0.attn_q.weight``).

    Raises ModelFormatError when the header is damaged or the file truncated, ModelNotFoundError when
    there is no such file.
    """

    format = "gguf"

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.version = header.version
        self.metadata: Mapping[str, Any] = header.metadata
        self._tensors = header.tensors
        self._mapped: Tensor | None = None

    def names(self) -> Sequence[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape (GGUF's own order reversed). KeyError if absent."""
        return self._tensors[name].shape

    def quant_type(self, name: str) -> str:
        """How the tensor is stored: "F32", "Q4_1", "Q6_K", … KeyError if absent."""
        return self._tensors[name].quant_type

    def raw(self, name: str) -> Tensor:
        """The stored blocks, [rows, bytes per row] uint8, memory-mapped (copy on write)."""
        tensor = self._tensors[name]
        rows = 1
        for dim in tensor.shape[:-1]:
            rows *= dim
        return self._bytes(tensor).view(rows, -1)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``; memory-mapped when it is stored so, otherwise fresh."""
        stored = self.view(name)
        if stored is not None:
            return stored.to(dtype)
        from foretell.store.gguf_dequant import dequantise

        tensor = self._tensors[name]
        block, block_bytes = _BLOCKS[tensor.quant_type]
        data = self._bytes(tensor).view(-1, block_bytes)
        return dequantise(data, tensor.quant_type, block, dtype).view(tensor.shape)

    def view(self, name: str) -> Tensor | None:
        """The tensor as it is stored, memory-mapped; None where it is quantised."""
        import torch

        tensor = self._tensors[name]
        stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.quant_type)
        if stored is None:
            return None
        data = self._bytes(tensor)
        if tensor.offset % stored.itemsize:  # general.alignment may be 1; torch views may not
            data = data.clone()
        return data.view(stored).view(tensor.shape)

    def _bytes(self, tensor: GGUFTensor) -> Tensor:
        return self._map()[tensor.offset : tensor.offset + tensor.nbytes]

    def _map(self) -> Tensor:
        if self._mapped is None:
            import numpy
            import torch

            needed = max((t.offset + t.nbytes for t in self._tensors.values()), default=0)
            # Copy-on-write: torch wants writable memory, and a write must never reach the file.
            mapped = numpy.memmap(self.path, mode="c")
            if mapped.size < needed:  # it shrank since the header was read
                raise ModelFormatError(
                    f"{self.path.name} is truncated: it has {mapped.size} bytes and needs {needed}; fetch it again"
                )
            self._mapped = torch.from_numpy(mapped)
        return self._mapped
