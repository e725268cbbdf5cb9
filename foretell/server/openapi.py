"""The OpenAPI document: routes parse their bodies themselves, so they say here what they take and give."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from foretell.server.auth import OPEN_PATHS
from foretell.server.protocol.base import ErrorResponse

_REF = "#/components/schemas/{model}"
_REQUEST_MODELS: set[type[BaseModel]] = set()
_CHUNK_MODELS: set[type[BaseModel]] = set()
_MEANINGS = {
    400: "The request can never be served as asked.",
    401: "No valid API key.",
    403: "Not allowed.",
    404: "No such model or route.",
    405: "The route has other methods.",
    408: "The body came too slowly, or the request was not finished by its deadline.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; see Retry-After.",
    500: "The engine failed on this request.",
    503: "The engine is not available now.",
}
COMMON_ERRORS = (401, 403)
BODY_ERRORS = (400, 404, 408, 413, 415)
ENGINE_ERRORS = (408, 429, 500, 503)


def describe(
    response: Any,
    *,
    body: type[BaseModel] | None = None,
    summary: str,
    stream: bool | type[BaseModel] = False,
    errors: tuple[int, ...] = (),
    error_model: type[BaseModel] = ErrorResponse,
    tags: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Keyword arguments for ``router.post``: ``response`` is the model of a 200 answer, ``body`` that of the request;
    ``stream`` says that the answer may also be server-sent events, and of what."""
    answers: dict[int | str, dict[str, Any]] = {200: {"model": response}}
    if stream:
        what = "Server-sent events."
        if not isinstance(stream, bool):
            _CHUNK_MODELS.add(stream)
            what = f"Events whose data is a {stream.__name__}; after the last one, `data: [DONE]`."
        answers[200]["content"] = {"text/event-stream": {"schema": {"description": what}}}
    for status in sorted({*COMMON_ERRORS, *(BODY_ERRORS if body else ()), *errors}):
        answers[status] = {"model": error_model, "description": _MEANINGS[status]}
    extra: dict[str, Any] = {}
    if body is not None:
        _REQUEST_MODELS.add(body)
        schema = {"$ref": _REF.format(model=body.__name__)}
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {
        "responses": answers,
        "summary": summary,
        "openapi_extra": extra,
        "tags": list(tags),
        "response_model": None,
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document, made once per application."""
    if app.openapi_schema is None:
        made = get_openapi(
            title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes
        )
        models = sorted(_REQUEST_MODELS | _CHUNK_MODELS, key=lambda m: m.__name__)
        _, definitions = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
        components = made.setdefault("components", {})
        schemas = {**definitions.get("$defs", {}), **components.get("schemas", {})}
        components["schemas"] = dict(sorted(schemas.items()))
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"bearer": []}, {"apiKey": []}]
        app.openapi_schema = made
    return app.openapi_schema
