"""Fields that take one of several shapes, and refuse the others by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def only(
    what: str, *kinds: str, hint: str = "", default: str | None = None, plain: tuple[str, ...] = ()
) -> Callable[[Any], Any]:
    """A check to run before validation: of objects, only those whose ``type`` is one of ``kinds`` go on;
    ``plain`` are texts that may stand in place of an object. The refusal names the type."""
    allowed = ", ".join((*plain, *kinds))

    def check(value: Any) -> Any:
        if isinstance(value, str) and plain:
            if value in plain:
                return value
            raise ValueError(f"{what} {value[:60]!r} is not supported: use {allowed}")
        if not isinstance(value, dict):
            if hasattr(value, "type"):
                return value  # a model of ours, checked already
            raise ValueError("it should be an object")
        kind = value.get("type", default)
        if not isinstance(kind, str):
            raise ValueError(f"its type is missing: use {allowed}")
        if kind not in kinds:
            raise ValueError(f"{what} {kind[:60]!r} is not supported: use {allowed}{'; ' + hint if hint else ''}")
        return value

    return check


def kind_tag(value: Any, default: str = "") -> str:
    """The tag of one of several models, by its type. Brackets keep tags out of the names that errors give fields."""
    return f"[{value.get('type', default) if isinstance(value, dict) else value.type}]"


def one_or_many(value: Any) -> str | None:
    """The tag of a field that is either one text or a list."""
    return "[one]" if isinstance(value, str) else "[many]" if isinstance(value, list) else None


def unsupported(why: str) -> Callable[[Any], Any]:
    """A check for a field that is known but asks for something this server does not do; None asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None:
            raise ValueError(f"this is not supported: {why}")
        return value

    return check
