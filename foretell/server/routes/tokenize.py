"""POST /tokenize and /detokenize: text ↔ token ids, without the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from fastapi import APIRouter, Request, Response

from foretell.core.params import SamplingParams
from foretell.errors import InvalidRequestError
from foretell.server.answers import token_ids
from foretell.server.chat import ChatRequest, prompt_ids_aside
from foretell.server.chat_input import messages_of, tools_of
from foretell.server.context import Server, server_of
from foretell.server.limits import parse
from foretell.server.openapi import describe
from foretell.server.protocol.tokenize import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from foretell.server.responses import json_response
from foretell.server.sampling import check_count

if TYPE_CHECKING:
    from foretell.store import Tokenizer

T = TypeVar("T")
router = APIRouter()
_THREAD_TOKENS = 4096


@router.post(
    "/tokenize",
    **describe(TokenizeResponse, body=TokenizeRequest, summary="Text or messages to token ids", tags=("tokenize",)),
)
async def tokenize(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, TokenizeRequest, server.config)
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    if body.prompt == "":
        ids = tokenizer.encode("", add_special_tokens=body.add_special_tokens is not False)
    elif body.prompt is not None:
        special = body.add_special_tokens is not False
        ids = await token_ids(server.engine, body.prompt, special, server.config.max_prompt_chars)
    else:
        ids = await prompt_ids_aside(server.engine, _chat(body, server))
    texts = (
        await _aside(len(ids), lambda: [tokenizer.token(i) or "" for i in ids]) if body.return_token_strs else None
    )
    about = server.engine.about
    return json_response(
        {"count": len(ids), "max_model_len": about.max_model_len, "tokens": ids, "token_strs": texts}
    )


def _chat(body: TokenizeRequest, server: Server) -> ChatRequest:
    kwargs = body.chat_template_kwargs or {}
    check_count("chat_template_kwargs", len(kwargs), server.config.max_template_kwargs, "entries")
    tools, _ = tools_of(body.tools, None, server.config)
    return ChatRequest(
        messages_of(body.messages or [], server.config),
        SamplingParams(),
        tools=tools,
        template_kwargs=kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        max_prompt_chars=server.config.max_prompt_chars,
    )


@router.post(
    "/detokenize",
    **describe(DetokenizeResponse, body=DetokenizeRequest, summary="Token ids to text", tags=("tokenize",)),
)
async def detokenize(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, DetokenizeRequest, server.config)
    server.check_model(body.model)
    tokenizer = _tokenizer(server)
    ids = server.engine.preparer.token_ids(body.tokens) if body.tokens else []
    text = await _aside(len(ids), lambda: tokenizer.decode(ids, skip_special_tokens=False))
    return json_response({"prompt": text})


async def _aside(tokens: int, work: Callable[[], T]) -> T:
    """In a thread, if it takes long enough for others to notice."""
    return await asyncio.to_thread(work) if tokens > _THREAD_TOKENS else work()


def _tokenizer(server: Server) -> Tokenizer:
    if server.engine.tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer: it takes token ids only")
    return server.engine.tokenizer
