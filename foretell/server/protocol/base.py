"""Shared by all protocols: strict requests, and OpenAI's error object."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema


def _whole(value: object) -> object:
    """JSON knows one kind of number: 16.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


whole = BeforeValidator(_whole)


def _fail_fast(schema: Any) -> None:
    """Sets it on every list in ``schema``."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for inner in schema.values():
            _fail_fast(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _fail_fast(inner)


class Request(BaseModel):
    """Unknown fields are refused, and "5" is no number. A list is given up at its first fault: complaining about
    each of a million entries would take minutes."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema


class Response(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorObject(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Response):
    error: ErrorObject
