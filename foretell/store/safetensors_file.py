"""A folder of safetensors files as a TensorSource: memory-mapped, headers checked before anything is read.

Format: 8 bytes of little-endian header length, that many bytes of JSON
``{name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}}``, then the data the offsets refer to.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

INDEX_NAME: Final = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES: Final = 1 << 20
_DTYPE_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    nbytes: int


class SafetensorsSource:
    """Named tensors of all ``*.safetensors`` in ``folder``, or of the shards its index names.

    Raises ModelFormatError when a header, an index or a shard is damaged or missing.
    """

    format = "safetensors"

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.metadata: Mapping[str, Any] = {}
        self._entries: dict[str, _Entry] = {}
        self._open: dict[Path, Any] = {}
        index = self.folder / INDEX_NAME
        promised = _read_index(index) if index.is_file() else None
        for file in _files_of(self.folder, promised):
            for name, entry in _read_header(file).items():
                if promised is not None and promised.get(name) != file.name:
                    continue  # a shard may hold tensors that the index leaves out or takes from elsewhere
                if name in self._entries:
                    first = self._entries[name].file.name
                    raise ModelFormatError(f"tensor {name!r} is in {first} and in {file.name}; keep one of the files")
                self._entries[name] = entry
        missing = [name for name in promised or () if name not in self._entries]
        if missing:
            raise ModelFormatError(
                f"{INDEX_NAME} names tensor {missing[0]!r} and {len(missing) - 1} more that their shard "
                f"{(promised or {})[missing[0]]} does not hold; fetch the model again"
            )

    def names(self) -> Sequence[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape. KeyError if absent."""
        return self._entries[name].shape

    def stored_dtype(self, name: str) -> str:
        """The dtype in the file, as safetensors spells it: "BF16", "F32", … KeyError if absent."""
        return self._entries[name].dtype

    def place(self, name: str) -> tuple[Path, int, int]:
        """Where the tensor's bytes lie: file, offset and length in bytes. KeyError if absent."""
        entry = self._entries[name]
        return entry.file, entry.offset, entry.nbytes

    def same_bytes(self, first: str, second: str) -> bool:
        """Whether two tensors are stored alike, to the bit. KeyError if one is absent."""
        a, b = self._entries[first], self._entries[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        try:
            with a.file.open("rb") as left, b.file.open("rb") as right:
                left.seek(a.offset)
                right.seek(b.offset)
                for at in range(0, a.nbytes, _PIECE_BYTES):
                    size = min(_PIECE_BYTES, a.nbytes - at)
                    if left.read(size) != right.read(size):
                        return False
        except OSError as error:
            raise ModelFormatError(f"{a.file.name} cannot be read: {error.strerror or error}") from None
        return True

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``: memory-mapped when it is stored so, otherwise fresh."""
        return self.view(name).to(dtype)

    def view(self, name: str) -> Tensor:
        """The tensor as it is stored, memory-mapped."""
        tensor: Tensor = self._handle(self._entries[name].file).get_tensor(name)
        return tensor

    def _handle(self, file: Path) -> Any:
        handle = self._open.get(file)
        if handle is None:
            from safetensors import SafetensorError, safe_open

            try:
                handle = self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelFormatError(f"{file.name} cannot be read: {error}; fetch it again") from None
        return handle


def _files_of(folder: Path, promised: Mapping[str, str] | None) -> list[Path]:
    if promised is None:
        whole = folder / "model.safetensors"
        if whole.is_file():  # beside it may lie the same weights under the publisher's own names
            return [whole]
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelNotFoundError(f"{folder} holds no .safetensors file; check the path")
        return files
    files = [folder / name for name in sorted(set(promised.values()))]
    for file in files:
        if not file.is_file():
            raise ModelFormatError(f"{INDEX_NAME} names the shard {file.name}, which is not there; fetch it")
    return files


def _read_index(path: Path) -> dict[str, str]:
    """The index's ``weight_map``: tensor name → shard file name, always a plain name inside the folder."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        pairs = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelFormatError(f"{path.name} has no readable weight_map; fetch it again") from None
    except OSError as error:
        raise ModelFormatError(f"{path.name} cannot be read: {error.strerror}") from None
    for shard in pairs.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\0" in shard:
            raise ModelFormatError(f"{path.name} names {shard[:80]!r}, which is no .safetensors file of its folder")
    return pairs


def _read_header(path: Path) -> dict[str, _Entry]:
    """Validates one file's header against its size and returns what it holds."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(path, f"it has {size} bytes, fewer than a header")
            length = struct.unpack("<Q", prefix)[0]
            if length > size - 8:
                raise _bad(path, f"truncated: its header is {length} bytes long and the file has {size}")
            if length > _MAX_HEADER_BYTES:
                raise _bad(path, f"its header of {length} bytes exceeds the format's limit")
            text = file.read(length)
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except _DuplicateError as error:
        raise _bad(path, f"its header holds {str(error)[:80]!r} twice") from None
    except (ValueError, RecursionError):
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return _check_entries(path, header, size - 8 - length, 8 + length)


def _check_entries(path: Path, header: dict[str, Any], data_bytes: int, data_at: int) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    extents: list[tuple[int, int, str]] = []
    for name, info in header.items():
        try:
            dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise _bad(path, f"the entry of {name[:80]!r} lacks dtype, shape or two offsets") from None
        if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
            raise UnsupportedModelError(
                f"{path.name} stores {name[:80]!r} as {str(dtype)[:20]}; supported: {', '.join(_DTYPE_BYTES)}"
            )
        whole = [begin, end, *shape] if isinstance(shape, list) else [None]
        if any(type(number) is not int or not 0 <= number < 1 << 63 for number in whole):
            raise _bad(path, f"the shape or offsets of {name[:80]!r} are no natural numbers")
        needed = _DTYPE_BYTES[dtype]
        for dim in shape:
            needed *= dim
        if end - begin != needed:
            raise _bad(path, f"{name[:80]!r} is {dtype} {shape}, {needed} bytes, and has {end - begin}")
        if end > data_bytes:
            raise _bad(path, f"truncated: {name[:80]!r} ends at byte {end} of {data_bytes} bytes of data")
        entries[name] = _Entry(path, dtype, tuple(shape), data_at + begin, needed)
        extents.append((begin, end, name))
    extents.sort()
    for (_, end, before), (begin, _, after) in pairwise(extents):
        if begin < end:
            raise _bad(path, f"{before[:80]!r} and {after[:80]!r} overlap")
    return entries


class _DuplicateError(ValueError):
    """A key that a JSON object holds twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateError(key)
        result[key] = value
    return result


def _bad(path: Path, why: str) -> ModelFormatError:
    return ModelFormatError(f"{path.name} is no valid safetensors file: {why}; fetch it again")
