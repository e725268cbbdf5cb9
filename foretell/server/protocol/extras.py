"""What /v1/responses and /v1/messages take beyond their own interfaces."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from foretell.server.protocol.base import Request


class Extras(Request):
    """Under the names that /v1/chat/completions has for them; the clients send them as extra_body."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None  # lower goes first
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] | None = None
