"""JSON of ours against the models of the official clients: every field known, typed and, where required, there."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter


def strictly(model: Any, value: Any, *, beyond: Collection[str] = ()) -> Any:
    """``value`` as ``model`` (a class or a union of them) without any coercion; AssertionError for a field that the
    model does not know and that is not one of ``beyond``, ValidationError for one that is missing or of another
    type."""
    made = _adapter(model).validate_python(value, strict=True)
    unknown = [path for path in _unknown(made, "$") if path.rpartition(".")[2] not in beyond]
    assert not unknown, f"fields that {model} does not have: {unknown}"
    return made


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def one_of(union: Any, value: Any) -> Any:
    """The member of a union of models that has ``value``'s type; to check against it alone is much faster."""
    for member in get_args(get_args(union)[0]):
        if value["type"] in get_args(member.model_fields["type"].annotation):
            return strictly(member, value)
    raise AssertionError(f"{union} has no member of type {value['type']!r}")


def _unknown(value: Any, path: str) -> Any:
    if isinstance(value, BaseModel):
        for name in value.model_extra or ():
            yield f"{path}.{name}"
        for name in type(value).model_fields:
            yield from _unknown(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _unknown(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _unknown(inner, f"{path}[{position}]")
