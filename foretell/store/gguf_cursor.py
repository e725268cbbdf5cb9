"""A cursor over GGUF's metadata that never moves past the end of the file and never trusts a count."""

from __future__ import annotations

import mmap
import struct
from typing import Any, Final

from foretell.errors import ModelFormatError

_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_ELEMENTS = 16_000_000  # metadata values in one header; the largest vocabularies have about 1M
_MAX_STRING_BYTES = 64 << 20
_MAX_NESTING = 4


class Cursor:
    """Reads typed values at ``at``; ModelFormatError when they do not fit into the file."""

    def __init__(self, data: mmap.mmap, size: int, name: str) -> None:
        self.data, self.size, self.name = data, size, name
        self.at = 0
        self.elements_left = _MAX_ELEMENTS

    # --- values ---------------------------------------------------------------------------------------

    def value(self, kind: int, key: str, depth: int) -> Any:
        self.spend(1, key)
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self.array(key, depth)
        if kind not in _SCALARS:
            raise self.bad(f"metadata {key!r} has unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str, depth: int) -> list[Any]:
        if depth >= _MAX_NESTING:
            raise self.bad(f"metadata {key!r} nests arrays more than {_MAX_NESTING} deep")
        kind, count = int(self.scalar("<I")), int(self.scalar("<Q"))
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            self.check_count(count, width, f"elements of {key!r}")
            self.spend(count, key)
            values = list(struct.unpack_from(f"<{count}{_SCALARS[kind][1]}", self.data, self.at))
            self.at += count * width
            return values
        if kind == _STRING:
            self.check_count(count, 8, f"elements of {key!r}")
            self.spend(count, key)
            return self.strings(count, key)
        if kind == _ARRAY:
            self.check_count(count, 12, f"elements of {key!r}")
            return [self.value(_ARRAY, key, depth + 1) for _ in range(count)]
        raise self.bad(f"metadata {key!r} is an array of unknown type {kind}")

    def strings(self, count: int, key: str) -> list[str]:
        """``count`` strings. The hot loop of the header: a vocabulary has up to a quarter million of them."""
        data, at, size, length_at = self.data, self.at, self.size, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append = strings.append
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(data, at)[0]
                if at > size:
                    raise self.ends(f"a string of {key!r}", at - start, start)
                append(data[start:at].decode())
        except struct.error:
            raise self.ends(f"a string of {key!r}", 8, at) from None
        except UnicodeDecodeError:
            raise self.bad(f"a string of {key!r} is not UTF-8") from None
        self.at = at
        return strings

    def string(self, what: str) -> str:
        length = int(self.scalar("<Q"))
        if length > _MAX_STRING_BYTES or length > self.size - self.at:
            raise self.ends(what, length, self.at)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None

    def scalar(self, layout: str) -> Any:
        width = struct.calcsize(layout)
        if width > self.size - self.at:
            raise self.ends("a field", width, self.at)
        value = struct.unpack_from(layout, self.data, self.at)[0]
        self.at += width
        return value

    # --- refusals -------------------------------------------------------------------------------------

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        if count * least_bytes > self.size - self.at:
            raise self.ends(f"{count} {what}", count * least_bytes, self.at)

    def spend(self, elements: int, key: str) -> None:
        self.elements_left -= elements
        if self.elements_left < 0:
            raise self.bad(f"its metadata holds more than {_MAX_ELEMENTS} values (at {key!r})")

    def ends(self, what: str, needed: int, at: int) -> ModelFormatError:
        left = max(0, self.size - at)
        return ModelFormatError(
            f"{self.name} is truncated or corrupt: {what} at byte {at} needs {needed} bytes and {left} of the file's "
            f"{self.size} are left; fetch it again"
        )

    def bad(self, why: str) -> ModelFormatError:
        return ModelFormatError(f"{self.name} is no valid GGUF file: {why}; fetch it again or convert it anew")
