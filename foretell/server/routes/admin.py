"""Admin routes: they change things for everybody, so they are refused where no key is configured (see auth.py)."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from foretell.server.context import server_of
from foretell.server.limits import parse
from foretell.server.openapi import ENGINE_ERRORS, describe
from foretell.server.protocol.admin import PolicyRequest, PolicyResponse, StatsResponse, StepsRequest, StepsResponse
from foretell.server.responses import json_response
from foretell.server.sse import unless_gone

router = APIRouter()


@router.post(
    "/admin/policy",
    **describe(
        PolicyResponse,
        body=PolicyRequest,
        summary="Switch the scheduling policy between two steps",
        errors=ENGINE_ERRORS,
        tags=("admin",),
    ),
)
async def set_policy(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, PolicyRequest, server.config)
    await unless_gone(request.receive, server.engine.control("set_policy", name=body.policy))
    return json_response(PolicyResponse(policy=body.policy))


@router.get(
    "/admin/stats", **describe(StatsResponse, summary="The engine's newest figures", errors=(503,), tags=("admin",))
)
async def stats(request: Request) -> Response:
    return json_response({"stats": dict(server_of(request).engine.stats())})


@router.post(
    "/admin/steps",
    **describe(
        StepsResponse,
        body=StepsRequest,
        summary="Step records since the last call; the first call begins to keep them",
        errors=ENGINE_ERRORS,
        tags=("admin",),
    ),
)
async def steps(request: Request) -> Response:
    server = server_of(request)
    body = await parse(request, StepsRequest, server.config)
    return json_response(
        {"steps": await unless_gone(request.receive, server.engine.control("steps", keep=body.keep))}
    )
