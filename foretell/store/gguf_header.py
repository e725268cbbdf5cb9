"""The header of a GGUF file, read with every count and offset checked against the file's size.

GGUF parsers that trust counts have been a steady source of overflows and hangs, and ``gguf.GGUFReader``
builds one numpy object per metadata element (seconds for a vocabulary). This one decodes to plain Python
values in one pass; whatever the bytes are, it returns a header or raises ModelFormatError, and allocates
at most a small multiple of the file's size.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from foretell.store.gguf_cursor import Cursor

if TYPE_CHECKING:
    from collections.abc import Mapping

# ggml type id: (name, weights per block, bytes per block)
GGML_TYPES: Final[Mapping[int, tuple[str, int, int]]] = MappingProxyType({
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
})  # fmt: skip

# Types that exist but that nothing here computes with: named in the error instead of "corrupt".
_UNREAD_TYPES: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. ``shape`` is row-major (torch order); ``offset`` is in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    quant_type: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """A validated header: every tensor lies whole inside the file and overlaps no other."""

    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Reads and validates the header of ``path``. ModelFormatError when it is damaged, truncated or foreign.

    The last header is remembered: at a start the configuration, the weights and the tokenizer each ask for it.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be opened: {error.strerror}; check the path") from None
    return _read(path, state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=1)
def _read(path: Path, size: int, mtime_ns: int, inode: int) -> GGUFHeader:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise ModelFormatError(
                    f"{path.name} is no GGUF file: it has {size} bytes, fewer than a header; fetch it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Parser(view, size, path.name).parse()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}") from None


class _Parser(Cursor):
    """The records of a header, in the order they lie in the file."""

    def parse(self) -> GGUFHeader:
        version, tensor_count, kv_count = self._counts()
        metadata: dict[str, Any] = {}
        for _ in range(kv_count):
            key = self.string("a metadata key")
            if key in metadata:
                raise self.bad(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("<I"), key, 0)
        if metadata.get("split.count", 1) not in (0, 1):
            raise UnsupportedModelError(
                f"{self.name} is one part of a split GGUF; join the parts with `llama-gguf-split --merge` first"
            )
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        data_start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for tensor in infos:
            if tensor.offset % alignment:
                raise self.bad(f"tensor {tensor.name!r} starts off its {alignment}-byte alignment")
            if tensor.name in tensors:
                raise self.bad(f"tensor {tensor.name!r} appears twice")
            start = data_start + tensor.offset
            tensors[tensor.name] = GGUFTensor(tensor.name, tensor.shape, tensor.quant_type, start, tensor.nbytes)
        self._check_extents(tensors)
        return GGUFHeader(version, MappingProxyType(metadata), MappingProxyType(tensors))

    def _counts(self) -> tuple[int, int, int]:
        if self.data[:4] != b"GGUF":
            raise self.bad(f"it starts with {self.data[:4]!r} instead of b'GGUF'")
        self.at = 4
        version = int(self.scalar("<I"))
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise UnsupportedModelError(f"{self.name} is a big-endian GGUF; use the little-endian file")
            raise self.bad(f"GGUF version {version} is not 2 or 3")
        tensor_count, kv_count = int(self.scalar("<Q")), int(self.scalar("<Q"))
        # The smallest tensor record has 32 bytes (name, one dimension, type, offset), the smallest pair 13.
        self.check_count(tensor_count, 32, "tensors")
        self.check_count(kv_count, 13, "metadata entries")
        return version, tensor_count, kv_count

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self.bad(f"general.alignment is {str(alignment)[:40]}, not a power of two")
        return alignment

    def _tensor_info(self) -> GGUFTensor:
        """The record of one tensor, with its offset still relative to the data section."""
        name = self.string("a tensor name")
        rank = int(self.scalar("<I"))
        if not 1 <= rank <= _MAX_DIMS:
            raise self.bad(f"tensor {name!r} has {rank} dimensions; 1 to {_MAX_DIMS} are possible")
        dims = [int(self.scalar("<Q")) for _ in range(rank)]
        type_id, offset = int(self.scalar("<I")), int(self.scalar("<Q"))
        if type_id not in GGML_TYPES:
            if type_id in _UNREAD_TYPES:
                raise UnsupportedModelError(
                    f"{self.name} stores {name!r} as {_UNREAD_TYPES[type_id]}; supported: "
                    + ", ".join(kind for kind, _, _ in GGML_TYPES.values())
                )
            raise self.bad(f"tensor {name!r} has unknown type {type_id}")
        kind, block, block_bytes = GGML_TYPES[type_id]
        elements = 1
        for dim in dims:
            elements *= dim
        if elements == 0 or elements >= 1 << 63:
            raise self.bad(f"tensor {name!r} has impossible dimensions {dims}")
        if dims[0] % block:
            raise self.bad(f"tensor {name!r} has rows of {dims[0]} weights, no multiple of {kind}'s {block}")
        return GGUFTensor(name, tuple(reversed(dims)), kind, offset, elements // block * block_bytes)

    def _check_extents(self, tensors: Mapping[str, GGUFTensor]) -> None:
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        needed = max((tensor.offset + tensor.nbytes for tensor in ordered), default=0)
        if needed > self.size:
            raise ModelFormatError(
                f"{self.name} is truncated: it has {self.size} bytes and its header promises at least {needed}; "
                "fetch it again"
            )
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self.bad(f"tensors {before.name!r} and {after.name!r} overlap")
