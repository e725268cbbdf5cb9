"""Who may ask: keys compared in constant time, and Host names where there is no key."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from foretell.server.config import is_address, is_loopback
from foretell.server.errors import ApiError

if TYPE_CHECKING:
    from foretell.server.config import ServerConfig

OPEN_PATHS = frozenset({"/health"})  # liveness: a probe has no key, and the answer tells nothing
ADMIN_PREFIX = "/admin/"


def presented_keys(headers: Mapping[str, str]) -> list[str]:
    """Keys in ``Authorization: Bearer KEY`` (OpenAI's clients) and ``x-api-key: KEY`` (Anthropic's)."""
    keys = []
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        keys.append(token.strip())
    if "x-api-key" in headers:
        keys.append(headers["x-api-key"])
    return keys


def matches(presented: Iterable[str], allowed: Iterable[str]) -> bool:
    """Every pair is compared, in time that does not depend on where they differ."""
    found = False
    wanted = [key.encode() for key in allowed]
    for key in presented:
        for other in wanted:
            found |= hmac.compare_digest(key.encode("utf-8", "surrogateescape"), other)
    return found


def authorize(path: str, headers: Mapping[str, str], config: ServerConfig) -> None:
    """ApiError 401 or 403 unless this request may go on."""
    if path in OPEN_PATHS:
        return
    if not config.api_keys:
        _check_host(headers.get("host", ""), config)
    elif not matches(presented_keys(headers), (*config.api_keys, *config.admin_api_keys)):
        raise ApiError(
            401,
            "no valid API key: send it as Authorization: Bearer KEY or x-api-key: KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    if path.startswith(ADMIN_PREFIX):
        _authorize_admin(headers, config)


def _authorize_admin(headers: Mapping[str, str], config: ServerConfig) -> None:
    keys = config.admin_api_keys or config.api_keys
    if not keys:
        raise ApiError(403, "admin routes need a key: start the server with an API key", code="admin_disabled")
    if not matches(presented_keys(headers), keys):
        raise ApiError(403, "this key does not open admin routes", code="admin_only")


def _check_host(host: str, config: ServerConfig) -> None:
    """Against DNS rebinding: a browser sends the name of the page's own server."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    if config.allow_anyone and is_address(name):  # what a web page would send is the name it came from
        return
    if not (is_loopback(name) or name in config.allowed_hosts or host in config.allowed_hosts):
        raise ApiError(
            403,
            "this server has no API key and answers local names only: use 127.0.0.1, "
            "or start it with an API key or --allowed-host",
            code="host_not_allowed",
        )
