"""Answers as bytes: JSON through msgspec."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Response
from pydantic import BaseModel

_encode = msgspec.json.Encoder().encode


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """``content``: a pydantic model or plain values. NaN and infinities become null, as JSON has none."""
    body = content.model_dump_json().encode() if isinstance(content, BaseModel) else _encode(content)
    return Response(body, status, headers, "application/json")
