"""The admin routes."""

from __future__ import annotations

from typing import Any

from foretell.config import PolicyName
from foretell.server.protocol.base import Request, Response


class PolicyRequest(Request):
    policy: PolicyName


class PolicyResponse(Response):
    policy: PolicyName


class StatsResponse(Response):
    stats: dict[str, Any]
