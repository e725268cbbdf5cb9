"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from foretell.server.protocol.base import Request, Response, whole
from foretell.server.protocol.completions import Text, TokenIds
from foretell.server.protocol.sampling import Positive


class EmbeddingRequest(Request):
    model: str | None = None
    input: (
        Text | TokenIds | Annotated[list[Text], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    """Must equal the model's: its vectors cannot be shortened."""
    user: str | None = None
    add_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31), whole] | None = None
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] | None = None


class Embedding(Response):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Of length 1; as text: little-endian float32 in base64."""


class EmbeddingUsage(Response):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(Response):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
