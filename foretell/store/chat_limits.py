"""How much one rendering of a chat template may do: steps, characters and CPU seconds."""

from __future__ import annotations

import contextvars
import re
import time
from typing import Any, Final

from jinja2 import TemplateRuntimeError

MAX_CHARACTERS: Final = 16 << 20  # of the rendering, and of any string on the way
MAX_STEPS: Final = 2_000_000
MAX_CPU_SECONDS = 2.0
_MAX_ITEMS: Final = 1 << 20
_MAX_INT_BITS: Final = 4096
# Formats that pad by a lot, or by as much as an argument says: "%9999d", "%*d", "{:9999}", "{:{}}".
WIDE_PERCENT: Final = re.compile(r"%[^%A-Za-z]*(?:\d{4,}|\*)")
_WIDE_BRACES: Final = re.compile(r":[^{}]*(?:\d{4,}|\{)")
_PADDING_METHODS: Final = ("center", "ljust", "rjust", "zfill", "expandtabs")


class TemplateLimitError(TemplateRuntimeError):
    """The template did more than any honest one does."""


class Meter:
    """What one rendering has used up."""

    def __init__(self) -> None:
        self.steps = 0
        self.characters = 0
        self.deadline = time.thread_time() + MAX_CPU_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"it computes for more than {MAX_CPU_SECONDS:g} s")

    def emit(self, characters: int) -> None:
        self.step()
        self.characters += characters
        bounded(self.characters)


METER: Final[contextvars.ContextVar[Meter]] = contextvars.ContextVar("foretell_template_meter")


def bounded(characters: int) -> None:
    """Raises TemplateLimitError for a string of more than MAX_CHARACTERS."""
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")


def printed_size(value: Any) -> int:
    """About how many characters ``value`` prints as, shared parts counted each time they would be printed."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 16
    meter, total, pending, items = METER.get(), 0, [value], 0
    while pending:
        item = pending.pop()
        items += 1
        if items % 1024 == 0:
            meter.step()
        if items > _MAX_ITEMS:
            raise TemplateLimitError(f"it makes a value of more than {_MAX_ITEMS:,} items")
        if isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        total += len(item) if isinstance(item, str) else 16
        bounded(total)
    return total


def bound_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bound_bits(left.bit_length() + right.bit_length())
    for items, times in ((left, right), (right, left)):
        if isinstance(items, (str, list, tuple)) and isinstance(times, int):
            bounded(max(times, 0) * max(1, printed_size(items)))


def bound_bits(bits: int) -> None:
    if bits > _MAX_INT_BITS:
        raise TemplateLimitError(f"it computes a number of more than {_MAX_INT_BITS} bits")


def bound_method(owner: str, name: str, args: tuple[Any, ...]) -> None:
    """Bounds what a string method will return."""
    if name in ("format", "format_map", "translate", "maketrans"):
        if name != "format" or _WIDE_BRACES.search(owner):
            raise TemplateLimitError(f"it calls str.{name} in a way that is not allowed")
        bounded(len(owner) + owner.count("{") * sum(map(printed_size, args)))
    elif name in _PADDING_METHODS:
        for width in args:
            bounded(width * (1 + owner.count("\t")) if isinstance(width, int) else 0)
    elif name == "replace" and len(args) >= 2:
        bound_replace(owner, str(args[0]), str(args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        bounded(printed_size(args[0]) + len(owner) * len(args[0]))


def bound_replace(text: str, old: str, new: str) -> None:
    bounded(len(text) + text.count(old) * len(new))
