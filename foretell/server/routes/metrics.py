"""GET /metrics, in Prometheus' text format. It needs a key like the rest: it tells how busy others are."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from foretell.server.context import server_of
from foretell.server.metrics import CONTENT_TYPE
from foretell.server.openapi import describe

router = APIRouter()
_described = describe(None, summary="Metrics for Prometheus", tags=("health",))
_described["responses"][200] = {
    "description": "Metrics in Prometheus' text format.",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}


@router.get("/metrics", response_class=Response, **_described)
async def metrics(request: Request) -> Response:
    return Response(server_of(request).metrics.text(), media_type=CONTENT_TYPE)
