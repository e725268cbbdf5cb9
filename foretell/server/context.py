"""What every route has at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foretell.server.errors import ApiError

if TYPE_CHECKING:
    from fastapi import Request

    from foretell.server.config import ServerConfig
    from foretell.server.metrics import Metrics
    from foretell.server.text_engine import TextEngine


@dataclass(frozen=True, slots=True)
class Server:
    """``engine`` counts what goes through it in ``metrics``."""

    engine: TextEngine
    config: ServerConfig
    metrics: Metrics

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.config.served_model_names or (self.engine.about.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer with; ApiError 404 for a model that is not served here. None means whatever is."""
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise ApiError(
                404,
                f"the model {shown!r} is not served here: use {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def timeout(self, asked: float | None) -> float | None:
        """Seconds that a request may take; what it asks for counts up to the configured maximum."""
        if asked is None:
            return self.config.default_timeout_seconds
        return min(asked, self.config.max_timeout_seconds)


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["request_id"]
    return request_id
