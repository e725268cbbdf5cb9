"""POST /v1/embeddings: the pooled hidden state of each input, of length 1."""

from __future__ import annotations

import base64
import struct
from typing import Any

from fastapi import APIRouter, Request, Response

from foretell.core.params import SamplingParams
from foretell.server.answers import raise_if_failed, token_ids
from foretell.server.context import Server, server_of
from foretell.server.errors import ApiError
from foretell.server.limits import parse
from foretell.server.merge import merged
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.embeddings import EmbeddingRequest, EmbeddingResponse
from foretell.server.responses import json_response
from foretell.server.sampling import check_count, refused
from foretell.server.sse import unless_gone

router = APIRouter()


@router.post(
    "/v1/embeddings",
    **describe(
        EmbeddingResponse,
        body=EmbeddingRequest,
        summary="Vectors of texts",
        errors=ENGINE_ERRORS,
        tags=("embeddings",),
    ),
)
async def create_embeddings(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, EmbeddingRequest, server.config)
    return json_response(await unless_gone(request.receive, _embed(server, body)))


async def _embed(server: Server, body: EmbeddingRequest) -> dict[str, Any]:
    config, engine = server.config, server.engine
    model = server.check_model(body.model)
    inputs: list[Any] = body.input if isinstance(body.input, list) else [body.input]
    if isinstance(inputs[0], int):
        inputs = [inputs]
    check_count("input", len(inputs), config.max_inputs, "entries")
    params = SamplingParams(max_tokens=1, detokenize=False, pooling=config.embedding_pooling)
    special = body.add_special_tokens is not False
    ids = [await token_ids(engine, one, special, config.max_prompt_chars) for one in inputs]
    for one in ids:
        engine.check(one, params)
    limit = server.timeout(body.timeout_seconds)
    streams = [engine.stream(i, params, priority=body.priority or 0, timeout_seconds=limit) for i in ids]
    vectors: dict[int, list[float]] = {}
    async for number, update in merged(streams):
        raise_if_failed(update)
        vector = update.output.outputs[0].embedding
        if vector is not None:
            vectors[number] = vector
    if len(vectors) != len(ids):
        raise ApiError(500, "the engine gave no embedding", code="engine_error")
    if body.dimensions not in (None, len(vectors[0])):
        raise refused("dimensions", f"dimensions must be {len(vectors[0])}: this model's vectors cannot be shortened")
    tokens = sum(map(len, ids))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vectors[i], body.encoding_format)}
        for i in range(len(ids))
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector
