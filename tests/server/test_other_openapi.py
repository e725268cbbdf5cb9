"""The OpenAPI entries of /v1/responses and /v1/messages: what is in them, and that answers keep to them."""

from __future__ import annotations

from typing import Any

import pytest

from foretell.server.app import create_app
from foretell.server.local_engine import LocalTextEngine
from foretell.server.protocol.anthropic_answers import MessageObject, TokenCount
from foretell.server.protocol.responses_answers import ResponseObject
from tests.server.client import request

ASKED: list[tuple[str, dict[str, Any], Any]] = [
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 3, "top_logprobs": 1}, ResponseObject),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}, MessageObject),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi"}]}, TokenCount),
]


@pytest.mark.parametrize(("path", "body", "model"), ASKED)
def test_answers_are_what_the_document_says(tiny: LocalTextEngine, path: str, body: Any, model: Any) -> None:
    answer = request(tiny, "POST", path, json={"model": tiny.about.model, **body})
    assert answer.status_code == 200, answer.text
    model.model_validate(answer.json(), strict=True)
    entry = create_app(tiny).openapi()["paths"][path]["post"]
    assert entry["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{model.__name__}")


def test_errors_have_their_interfaces_shape(tiny: LocalTextEngine) -> None:
    schemas = {
        path: entry["post"]["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        for path, entry in create_app(tiny).openapi()["paths"].items()
        if path in [path for path, _, _ in ASKED]
    }
    assert schemas == {
        "/v1/responses": "ErrorResponse",
        "/v1/messages": "MessagesError",
        "/v1/messages/count_tokens": "MessagesError",
    }
    for path, body, _ in ASKED:
        answer = request(tiny, "POST", path, json={**body, "nonsense": 1})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert "nonsense is not a parameter" in error["message"]
        assert ("param" in error) == (path == "/v1/responses")


def test_no_two_models_share_a_name(tiny: LocalTextEngine) -> None:
    """Pydantic spells the module out where two do, and clients generated from the document would show it."""
    assert [name for name in create_app(tiny).openapi()["components"]["schemas"] if "__" in name] == []
