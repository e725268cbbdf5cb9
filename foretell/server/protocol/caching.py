"""Marks that say what to cache. They are accepted and change nothing: prefix caching is automatic here."""

from __future__ import annotations

from typing import Literal

from foretell.server.protocol.base import Request


class CacheControl(Request):
    """Anthropic's mark."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = None


class CacheBreakpoint(Request):
    """OpenAI's mark."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None
