"""Which models are served: the one, under each of its names."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from foretell.server.context import Server, server_of
from foretell.server.openapi import describe
from foretell.server.protocol.models import ModelCard, ModelList
from foretell.server.responses import json_response

router = APIRouter()


@router.get("/v1/models", **describe(ModelList, summary="List the models", tags=("models",)))
async def list_models(request: Request) -> Response:
    server = server_of(request)
    return json_response(ModelList(object="list", data=[_card(server, name) for name in server.model_names]))


@router.get(
    "/v1/models/{model:path}", **describe(ModelCard, summary="Describe a model", errors=(404,), tags=("models",))
)
async def get_model(request: Request, model: str) -> Response:
    server = server_of(request)
    return json_response(_card(server, server.check_model(model)))


def _card(server: Server, name: str) -> ModelCard:
    about = server.engine.about
    return ModelCard(
        id=name,
        object="model",
        created=about.created,
        owned_by="foretell",
        root=about.model,
        parent=None,
        max_model_len=about.max_model_len,
    )
