"""Numbers for people: 98.4 MB, 1.2 GFLOP, 12 ms. Bytes of memory are binary (MiB), operations decimal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from foretell.errors import ConfigError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)(B?)\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """ "512MiB", "2G" (binary, like MiB), "1.5GB" (decimal) or a plain number of bytes."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{text!r} is no size: write a number of bytes, or 512MiB, 2G, 1.5GB")
    number, power, binary, byte = match[1], match[2].upper(), match[3], match[4]
    base = 1000 if byte and not binary else 1024
    return int(float(number) * base ** _POWERS[power])


_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")


def binary_bytes(count: float) -> str:
    """1.5 GiB, 22.5 KiB, 17 B."""
    return _scaled(count, 1024, _BYTES)


def flops(count: float) -> str:
    """2.1 GFLOP."""
    return _scaled(count, 1000, _FLOPS)


def count(number: float) -> str:
    """134.5 M, 8.03 G written as billions: 8.03 B."""
    return _scaled(number, 1000, ("", "K", "M", "B", "T"))


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit for a whole table, so that its columns can be compared at a glance."""

    name: str
    size: float

    def show(self, value: float) -> str:
        scaled = value / self.size
        return f"{scaled:,.2f}" if 0 < scaled < 10 else f"{scaled:,.1f}" if scaled < 1000 else f"{scaled:,.0f}"


def shared_byte_unit(values: Iterable[float]) -> Unit:
    return _shared_unit(values, 1024, _BYTES)


def shared_flop_unit(values: Iterable[float]) -> Unit:
    return _shared_unit(values, 1000, _FLOPS)


def _shared_unit(values: Iterable[float], base: int, names: tuple[str, ...]) -> Unit:
    """The largest unit in which the largest value is at least ten: smaller values then keep some digits."""
    largest = max(values, default=0)
    power = 0
    while largest >= 10 * base ** (power + 1) and power < len(names) - 1:
        power += 1
    return Unit(names[power], base**power)


def _scaled(value: float, base: int, names: tuple[str, ...]) -> str:
    power = 0
    while value >= base and power < len(names) - 1:
        value /= base
        power += 1
    digits = 0 if power == 0 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {names[power]}".rstrip()


def seconds(value: float | None) -> str:
    """12.3 ms, 1.24 s; an em dash for what was not measured."""
    if value is None:
        return "—"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def tokens(number: int) -> str:
    """1k, 128k; exact when it is no round number."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def rate(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return "—"
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} tok/s"


def share(part: float, whole: float) -> str:
    """12.3 %."""
    percent = 100 * part / whole if whole else 0.0
    return (
        f"{percent:.0f} %" if percent >= 99.95 or percent == 0 else f"{percent:.1f} %" if percent >= 0.1 else "<0.1 %"
    )
