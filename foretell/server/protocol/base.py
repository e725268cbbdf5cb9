"""Shared by all protocols: strict requests, and OpenAI's error object."""

from __future__ import annotations

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _whole(value: object) -> object:
    """JSON knows one kind of number: 16.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


whole = BeforeValidator(_whole)


class Request(BaseModel):
    """Unknown fields are refused, and "5" is no number."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Response(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorObject(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Response):
    error: ErrorObject
