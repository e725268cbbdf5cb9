"""The application: routes, their errors, and the guard around them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from inspect import signature
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

import foretell
from foretell.errors import ForetellError
from foretell.server.config import ServerConfig
from foretell.server.context import Server, request_id_of
from foretell.server.errors import ApiError, ClientGoneError, error_body, told
from foretell.server.guard import App, Guard, Receive, Scope, Send
from foretell.server.metered import MeteredEngine
from foretell.server.metrics import Metrics
from foretell.server.openapi import document
from foretell.server.responses import json_response
from foretell.server.routes import admin, chat, completions, embeddings, health, messages, models, responses, tokenize
from foretell.server.routes import metrics as metrics_route
from foretell.server.story import ObservedEngine, Observer, Storyteller

if TYPE_CHECKING:
    from foretell.server.text_engine import TextEngine

ROUTERS = (
    completions.router, chat.router, responses.router, messages.router, embeddings.router, tokenize.router,
    models.router, health.router, metrics_route.router, admin.router,
)  # fmt: skip


def create_app(
    engine: TextEngine,
    config: ServerConfig | None = None,
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None,
    observers: Sequence[Observer] = (),
) -> FastAPI:
    """An ASGI application over ``engine``, which the caller starts and stops (``lifespan`` can do it).

    ``observers`` hear of every request when it is over; their order is the order they are told in.
    """
    config = config or ServerConfig()
    app = FastAPI(
        title="foretell",
        version=foretell.__version__,
        summary="OpenAI's and Anthropic's interfaces over one engine",
        openapi_url=None,  # made aside, below
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    metrics = Metrics(engine, lambda: (config.served_model_names or (engine.about.model,))[0])
    watched = ObservedEngine(engine) if observers else engine
    app.state.server = Server(MeteredEngine(watched, metrics), config, metrics)
    for router in ROUTERS:
        app.include_router(router)
    for kind in (ApiError, ForetellError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientGoneError, _nobody)
    app.add_middleware(Direct, routers=ROUTERS)
    app.add_middleware(Guard, config=config, on_answer=metrics.answered)
    if observers:
        app.add_middleware(Storyteller, observers=observers, model=app.state.server.model_names[0])
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_route("/openapi.json", _document, include_in_schema=False)
    return app


class Direct:
    """Calls functions that take a posted request and nothing else, and leaves other routes to the framework. Its way
    to a function (matching, looking for dependencies) is 70 of the 190 µs that a small request takes here."""

    def __init__(self, app: App, routers: Sequence[APIRouter]) -> None:
        self.app = app
        routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
        self.endpoints: dict[str, Callable[[Request], Awaitable[Response]]] = {
            route.path: route.endpoint
            for route in routes
            if route.methods == {"POST"} and list(signature(route.endpoint).parameters) == ["request"]
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        posted = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self.endpoints.get(scope["path"]) if posted else None
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except (ApiError, ForetellError) as error:
            response = await _answer(request, error)
        except ClientGoneError as error:
            response = await _nobody(request, error)
        await response(scope, receive, send)


async def _answer(request: Request, error: Exception) -> Response:
    """Errors of ours, and of the framework (no such route, wrong method), in the client's shape."""
    if isinstance(error, HTTPException):
        shown = error.detail if error.status_code >= 500 else _FRAMEWORK.get(error.status_code, str(error.detail))
        api = ApiError(error.status_code, shown, headers=dict(error.headers or {}))
    elif isinstance(error, RequestValidationError):
        api = ApiError(400, "the path or query is not valid", code="invalid_value")
    else:
        api = told(error)
    return json_response(error_body(api, request.url.path, request_id_of(request)), api.status, api.headers)


async def _document(request: Request) -> Response:
    """Making it takes a while, once: in a thread, so that nobody waits."""
    return json_response(await asyncio.to_thread(document, request.app))


async def _nobody(request: Request, error: Exception) -> Response:
    """The client has left: this answer is for the access log."""
    return Response(status_code=499)


_FRAMEWORK: dict[int, Any] = {
    404: "there is no such route here: GET /openapi.json lists them",
    405: "this route has other methods",
}
