"""The way from the HTTP process to the engine: what it can be sent, and in which form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from foretell.core.checks import check_priority
from foretell.errors import InvalidRequestError, UnavailableError
from foretell.server import wire

if TYPE_CHECKING:
    from foretell.core.messages import Output
    from foretell.core.params import SamplingParams
    from foretell.options import EngineOptions
    from foretell.server.supervisor import Supervisor


class EnginePort:
    """The engine, for the tracking: by messages."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def add(
        self, first_id: int, prompt_token_ids: list[int], params: SamplingParams, *, priority: int, arrival: float
    ) -> None:
        check_priority(priority)
        arrival += self._supervisor.clock_ahead_seconds
        try:
            frame = wire.encode(wire.Add(first_id, prompt_token_ids, params, priority, arrival))
            wire.check_frame(frame, wire.to_engine)  # what the engine could not read would end it
        except wire.WireError as error:
            raise InvalidRequestError(f"the request cannot be passed on: {error}") from None
        self._supervisor.send_frame(frame)

    def finish(self, request_ids: Sequence[int], reason: str) -> None:
        try:
            self._supervisor.send(wire.Finish(list(request_ids), reason))
        except UnavailableError:
            return  # the engine is gone, and the requests with it


def turn_back(news: list[Output], seconds: float) -> None:
    """From the clock of the engine's host to ours."""
    for output in news:
        if output.progress is not None:
            first = output.progress.first_scheduled - seconds
            output.progress = replace(output.progress, first_scheduled=first)


def wire_options(options: EngineOptions) -> dict[str, Any]:
    """The fields of ``options`` as msgpack can say them."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}
