"""The fields that every generating endpoint shares: OpenAI's, then vLLM's, then ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from foretell.server.protocol.base import Request, whole
from foretell.server.protocol.structured import ResponseFormat, StructuredOutputs
from foretell.server.protocol.usage import StreamOptions

TokenId = Annotated[int, Field(ge=0, lt=2**31), whole]
Positive = Annotated[int, Field(ge=1, lt=2**31), whole]
Natural = Annotated[int, Field(ge=0, lt=2**31), whole]


class SamplingFields(Request):
    model: str | None = None
    """One of the names that GET /v1/models lists; the one there is unless said otherwise."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    """Outputs per prompt."""
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    """0 is greedy; 1 unless said otherwise."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """By token id."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), whole] | None = None
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    max_tokens: Natural | None = None
    """For completions 16 unless said otherwise; for chat to the end of the context."""
    max_completion_tokens: Positive | None = None
    """The newer name of max_tokens; who gives both must mean the same."""
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Accepted from OpenAI's clients; changes nothing."""

    best_of: Positive | None = None
    """Must equal n."""
    use_beam_search: Literal[False] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    length_penalty: Literal[1] | None = None
    """Of beam search, which there is none of."""
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Natural | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1)] | None = None
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = None
    prompt_logprobs: Natural | None = None
    """How many of the likeliest tokens to report at each place of the prompt."""
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31), whole] | None = None
    """Lower goes first."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    """The form that the output must have; guided_… and response_format say the same in other words."""
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None

    # what vLLM's clients spell out as null when they do not use it
    cache_salt: None = None
    guided_decoding_backend: None = None
    guided_whitespace_pattern: None = None
    kv_transfer_params: None = None
    logits_processors: None = None
    request_id: None = None
    structural_tag: None = None
    truncate_prompt_tokens: None = None
    vllm_xargs: None = None

    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] | None = None
    """The request's deadline, up to the server's maximum."""
