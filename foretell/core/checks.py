"""What can never run, told before it is queued. Constants only are read here: any thread may ask."""

from __future__ import annotations

from foretell.errors import InvalidRequestError

MAX_PRIORITY = 2**31


def check_priority(priority: object) -> None:
    """InvalidRequestError unless it is a number that the order of requests is made for."""
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be a whole number within ±2^31, got {priority!r}")


def check_prompt_len(prompt_len: int, max_model_len: int, max_tokens_per_request: int) -> None:
    """InvalidRequestError for a prompt that leaves no room for an answer, and says which limit it meets (tokens)."""
    if prompt_len == 0:
        raise InvalidRequestError("the prompt is empty: send at least one token")
    if prompt_len >= max_tokens_per_request:
        context = max_tokens_per_request == max_model_len
        which, option = ("context", "max_model_len") if context else ("whole KV cache", "kv_cache_bytes")
        raise InvalidRequestError(
            f"the prompt has {prompt_len} tokens and the {which} holds {max_tokens_per_request}, of which one is for "
            f"the answer: shorten the prompt or raise {option}"
        )
