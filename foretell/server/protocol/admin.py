"""The admin routes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from foretell.config import PolicyName
from foretell.server.protocol.base import Request, Response, whole


class PolicyRequest(Request):
    policy: PolicyName


class PolicyResponse(Response):
    policy: PolicyName


class StatsResponse(Response):
    stats: dict[str, Any]


class StepsRequest(Request):
    keep: Annotated[int, whole, Field(ge=0, le=4096)] = 256
    """How many of the newest records to keep until the next call; 0 ends the recording."""


class StepsResponse(Response):
    steps: list[dict[str, Any]]
    """The records of the steps since the last call, oldest first."""
