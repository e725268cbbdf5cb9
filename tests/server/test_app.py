"""What stands around every route: keys, Host names, request ids, errors in the client's shape."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.errors import ConfigError, UnavailableError
from foretell.server.app import create_app
from foretell.server.auth import OPEN_PATHS
from foretell.server.config import ServerConfig
from foretell.server.local_engine import LocalTextEngine
from tests.server.client import request

KEY = "sk-0123456789"
LOCKED = ServerConfig(api_keys=(KEY, "sk-another-key"))


def all_routes(engine: Any) -> list[tuple[str, str]]:
    """Every method and path that the application answers, read off the application itself."""
    pending, found = list(create_app(engine).routes), []
    while pending:
        route = pending.pop()
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        if inner:
            pending.extend(inner)
        elif hasattr(route, "methods"):
            found += [(method, route.path) for method in route.methods or ()]
    return sorted(found)


def test_every_route_but_liveness_needs_a_key(tiny: LocalTextEngine) -> None:
    routes = all_routes(tiny)
    assert {path for _, path in routes} >= {"/health", "/ready", "/version", "/v1/models", "/openapi.json"}
    for method, path in [*routes, ("GET", "/no-such-route"), ("POST", "/docs"), ("OPTIONS", "/v1/models")]:
        for headers in ({}, {"authorization": "Bearer sk-wrong-key"}, {"x-api-key": ""}, {"authorization": KEY}):
            answer = request(tiny, method, path, LOCKED, headers=headers)
            if path in OPEN_PATHS:
                assert answer.status_code == 200
            else:
                assert answer.status_code == 401, (method, path, headers)
    assert {"/health"} == OPEN_PATHS


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"x-api-key": "sk-another-key"}])
def test_either_header_opens(tiny: LocalTextEngine, headers: dict[str, str]) -> None:
    assert request(tiny, "GET", "/v1/models", LOCKED, headers=headers).status_code == 200


def test_keys_are_compared_in_constant_time(tiny: LocalTextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each presented key meets each configured key in compare_digest, also after one has matched."""
    import hmac

    pairs = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: pairs.append((a, b)) or real(a, b))
    request(tiny, "GET", "/v1/models", LOCKED, headers={"x-api-key": KEY})
    assert pairs == [(KEY.encode(), KEY.encode()), (KEY.encode(), b"sk-another-key")]


def test_no_cross_origin_page_is_let_in(tiny: LocalTextEngine) -> None:
    """CORS is off: a preflight gets no permission, and no answer carries one."""
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    preflight = request(tiny, "OPTIONS", "/v1/models", headers=asked)
    assert preflight.status_code == 405
    plain = request(tiny, "GET", "/v1/models", headers={"origin": "http://evil.example"})
    for answer in (preflight, plain):
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "127.0.0.1.evil.example", "10.0.0.5"])
def test_dns_rebinding_reaches_nothing(tiny: LocalTextEngine, host: str) -> None:
    assert request(tiny, "GET", "/v1/models", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "[::1]", "LOCALHOST"])
def test_local_names_are_answered(tiny: LocalTextEngine, host: str) -> None:
    assert request(tiny, "GET", "/v1/models", headers={"host": host}).status_code == 200


def test_a_named_host_is_answered_when_configured(tiny: LocalTextEngine) -> None:
    config = ServerConfig(allowed_hosts=("llm.example",))
    assert request(tiny, "GET", "/v1/models", config, headers={"host": "llm.example:443"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.com"])
def test_listening_to_the_world_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="without a key"):
        ServerConfig(host=host)
    ServerConfig(host=host, api_keys=(KEY,))


def test_weak_keys_and_impossible_limits_are_refused() -> None:
    for keys in (("",), ("short",), ("with a space in it",), ("ключ-ключ-ключ",)):
        with pytest.raises(ConfigError, match="API key"):
            ServerConfig(api_keys=keys)
    with pytest.raises(ConfigError, match="max_n must be above 0"):
        ServerConfig(max_n=0)
    with pytest.raises(ConfigError, match="one text"):
        ServerConfig(api_keys="sk-0123456789")  # type: ignore[arg-type]


def test_request_ids_are_made_here(tiny: LocalTextEngine) -> None:
    first = request(tiny, "GET", "/v1/models", headers={"x-request-id": "theirs-1"})
    second = request(tiny, "GET", "/v1/models", headers={"x-request-id": "theirs-1"})
    ids = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(ids) == 2
    assert all(i.startswith("req-") for i in ids)
    assert first.headers["x-client-request-id"] == "theirs-1"


@pytest.mark.parametrize("bad", ["a b", "x" * 129, "a\tb", "<script>", "é"])
def test_a_strange_request_id_is_not_echoed(tiny: LocalTextEngine, bad: str) -> None:
    answer = request(tiny, "GET", "/v1/models", headers={"x-request-id": bad.encode("latin-1")})
    assert answer.status_code == 200
    assert "x-client-request-id" not in answer.headers


def test_errors_have_openai_shape(tiny: LocalTextEngine) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/x", 404),
    ):
        answer = request(tiny, method, path)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]


def test_models_lists_every_name(tiny: LocalTextEngine) -> None:
    config = ServerConfig(served_model_names=("alpha", "org/beta"))
    cards = request(tiny, "GET", "/v1/models", config).json()["data"]
    assert [card["id"] for card in cards] == ["alpha", "org/beta"]
    assert cards[0]["max_model_len"] == tiny.about.max_model_len
    assert request(tiny, "GET", "/v1/models/org/beta", config).json()["id"] == "org/beta"
    assert request(tiny, "GET", "/v1/models/gamma", config).json()["error"]["code"] == "model_not_found"


class Broken:
    """An engine whose every attribute fails, as a defect would."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def test_a_defect_is_a_plain_500_that_tells_nothing() -> None:
    answer = request(Broken(RuntimeError("secret /path")), "GET", "/v1/models")  # type: ignore[arg-type]
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"].startswith("req-")


def test_an_engine_that_is_gone_is_a_503() -> None:
    answer = request(Broken(UnavailableError("the engine is starting")), "GET", "/v1/models")  # type: ignore[arg-type]
    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "the engine is starting"
    assert int(answer.headers["retry-after"]) >= 1


def test_health_turns_red_with_the_engine() -> None:
    from tests.server.tiny import start_tiny

    engine = start_tiny()
    try:
        assert request(engine, "GET", "/health").json() == {"status": "ok"}
        assert request(engine, "GET", "/ready").status_code == 200
    finally:
        engine.close()
    assert request(engine, "GET", "/health").status_code == 503
    assert request(engine, "GET", "/ready").status_code == 503


def test_routes_are_declared_once(tiny: LocalTextEngine) -> None:
    routes = all_routes(tiny)
    assert len(routes) == len(set(routes)) >= 5
