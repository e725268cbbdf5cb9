"""How many tokens a request took, and how an answer may be streamed."""

from __future__ import annotations

from foretell.server.protocol.base import Request, Response


class PromptTokensDetails(Response):
    cached_tokens: int
    """Found in the prefix cache, so not computed."""


class Usage(Response):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class StreamOptions(Request):
    include_usage: bool | None = None
    """One more chunk at the end, with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Padding against traffic analysis: there is none."""
