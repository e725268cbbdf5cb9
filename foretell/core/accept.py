"""A result has come back: the token it brings, and whether the request has ended with it."""

from __future__ import annotations

from foretell.core.counters import Counters
from foretell.core.messages import ChunkResult, Output
from foretell.core.request import Request


def accept(request: Request, news: ChunkResult, counters: Counters) -> Output:
    """Take in what a chunk yielded. ``finish_reason`` of the output says how the request has ended, if it has; to
    end it is the scheduler's."""
    token_id, tokens = news.token_id, request.tokens
    output = Output(request.id, token_id, news.logprobs, news.prompt_logprobs, embedding=news.embedding)
    if news.error is not None:
        output.error = news.error
        output.finish_reason = "error"
    elif token_id is not None:
        tokens.append(token_id)
        counters.generation_tokens += 1
        if len(tokens) == request.prompt_len + 1:
            counters.prompt_tokens += request.prompt_len
        if token_id in request.stop_ids and request.num_outputs > request.params.min_tokens:
            output.finish_reason, output.stop_token = "stop", token_id
        elif news.ended:
            output.finish_reason = "stop"
        elif len(tokens) >= request.max_total_tokens:
            output.finish_reason = "length"
    elif news.embedding is not None:
        counters.prompt_tokens += request.prompt_len
        output.finish_reason = "stop"
    if request.progress_due or output.finish_reason is not None:
        request.progress_due = False
        output.progress = request.progress
    return output
