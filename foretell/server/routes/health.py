"""Liveness, readiness, version. /health is open to all and tells nothing but ok; the rest needs a key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

import foretell
from foretell.server.context import server_of
from foretell.server.openapi import describe
from foretell.server.protocol.models import Status, Version
from foretell.server.responses import json_response

router = APIRouter()
_UNAVAILABLE = {503: {"model": Status, "description": "Not now."}}


def _described(summary: str) -> dict[str, object]:
    made = describe(Status, summary=summary, tags=("health",))
    made["responses"].update(_UNAVAILABLE)
    return made


@router.get("/health", **_described("Whether the engine stepped, or was idle and answered, recently"))  # type: ignore[arg-type]
async def health(request: Request) -> Response:
    return _status(server_of(request).engine.is_healthy)


@router.get("/ready", **_described("Whether a request sent now would be taken"))  # type: ignore[arg-type]
async def ready(request: Request) -> Response:
    return _status(server_of(request).engine.is_ready)


@router.get("/version", **describe(Version, summary="The server's version", tags=("health",)))
async def version(request: Request) -> Response:
    return json_response(Version(version=foretell.__version__))


def _status(ok: bool) -> Response:
    status = Status(status="ok" if ok else "unavailable")
    return json_response(status, 200 if ok else 503)
