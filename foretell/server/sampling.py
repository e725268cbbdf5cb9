"""The fields of a request → SamplingParams, within the server's limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from foretell.core.params import SamplingParams
from foretell.server.errors import ApiError
from foretell.server.structured import structured_output

if TYPE_CHECKING:
    from foretell.server.config import ServerConfig
    from foretell.server.protocol.sampling import SamplingFields

_PLAIN = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "top_k", "min_p", "repetition_penalty",
    "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip


def sampling_params(
    fields: SamplingFields, config: ServerConfig, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """``max_tokens`` and ``logprobs`` are spelled differently by each endpoint. ApiError 400 beyond a limit."""
    n = fields.n or 1
    if fields.best_of not in (None, n):
        raise refused("best_of", f"best_of must equal n ({n}): there is no choosing among more outputs")
    if fields.stream_options is not None and not fields.stream:
        raise refused("stream_options", "stream_options needs stream=true")
    stops = [fields.stop] if isinstance(fields.stop, str) else list(fields.stop or ())
    check_count("n", n, config.max_n)
    check_count("logprobs", logprobs or 0, config.max_logprobs)
    check_count("prompt_logprobs", fields.prompt_logprobs or 0, config.max_prompt_logprobs)
    check_count("stop", len(stops), config.max_stops, "entries")
    check_count("bad_words", len(fields.bad_words or ()), config.max_bad_words, "entries")
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        check_count(name, len(getattr(fields, name) or ()), config.max_token_list, "entries")
    for name, texts in (("stop", stops), ("bad_words", fields.bad_words or ())):
        check_count(name, max(map(len, texts), default=0), config.max_stop_chars, "characters in one")
    given: dict[str, Any] = {name: getattr(fields, name) for name in _PLAIN if getattr(fields, name) is not None}
    given |= {"n": n, "max_tokens": max_tokens, "logprobs": logprobs, "stop": stops}
    given["logit_bias"] = {_token_id(key): bias for key, bias in (fields.logit_bias or {}).items()}
    given["allowed_token_ids"] = fields.allowed_token_ids
    given["stop_token_ids"] = fields.stop_token_ids or ()
    given["bad_words"] = fields.bad_words or ()
    structured = structured_output(fields, config)
    if structured is not None:
        given["structured"] = structured
    return SamplingParams(**given)


def max_tokens_of(fields: SamplingFields) -> int | None:
    """max_tokens, under either of its names; ApiError if they differ."""
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new not in (None, old):
        raise refused(
            "max_tokens", f"max_tokens={old} and max_completion_tokens={new} contradict each other: give one"
        )
    return new if old is None else old


def check_count(name: str, count: int, limit: int, unit: str = "") -> None:
    if count > limit:
        raise refused(name, f"{name} is limited to {limit}{' ' + unit if unit else ''} here, got {count}")


def refused(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise refused("logit_bias", f"logit_bias maps token ids to numbers, got the key {key[:40]!r}")
    return int(key)
