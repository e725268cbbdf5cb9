"""Log-probabilities in chat's shape and in vLLM's for prompts."""

from __future__ import annotations

from foretell.server.protocol.base import Response


class TopLogprob(Response):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(Response):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Response):
    content: list[TokenLogprob] | None
    refusal: None = None


class PromptLogprob(Response):
    logprob: float
    rank: int | None
    decoded_token: str


# one entry per prompt token, the first null; each maps token ids to their figures
PromptLogprobs = list[dict[str, PromptLogprob] | None]
