"""GET /v1/models, /version, /health and /ready."""

from __future__ import annotations

from typing import Literal

from foretell.server.protocol.base import Response


class ModelCard(Response):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(Response):
    object: Literal["list"]
    data: list[ModelCard]


class Version(Response):
    version: str


class Status(Response):
    status: Literal["ok", "unavailable"]
