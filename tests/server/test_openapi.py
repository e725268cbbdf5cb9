"""The OpenAPI document: it is what the server does, and the API reference is made from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foretell.server.app import create_app
from foretell.server.local_engine import LocalTextEngine
from tests.server.live import serving
from tests.server.schema_campaign import CONFIG, exercise, operations
from tests.server.test_app import all_routes

REFERENCE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def url(tiny: LocalTextEngine) -> Iterator[str]:
    with serving(tiny, CONFIG) as base:
        yield base


def document(engine: Any) -> dict[str, Any]:
    made: dict[str, Any] = create_app(engine).openapi()
    return made


def test_every_route_is_described(tiny: LocalTextEngine) -> None:
    described = {(method.upper(), path) for path, entry in document(tiny)["paths"].items() for method in entry}
    served = {(m, path.replace(":path", "")) for m, path in all_routes(tiny) if m != "HEAD"}
    assert served - described == {("GET", "/openapi.json")}
    assert described <= served


def test_every_operation_names_its_errors_and_its_key(tiny: LocalTextEngine) -> None:
    for path, entry in document(tiny)["paths"].items():
        for method, operation in entry.items():
            answers = operation["responses"]
            assert operation["summary"], path
            assert operation["security"] == ([] if path == "/health" else [{"bearer": []}, {"apiKey": []}])
            if method == "post":
                assert set(answers) >= {"400", "401", "403", "404", "408", "413", "415"}, path
                assert operation["requestBody"]["required"]
            for status, answer in answers.items():
                if int(status) >= 400:
                    assert "application/json" in answer["content"], (path, status)


def test_references_lead_somewhere(tiny: LocalTextEngine) -> None:
    whole = document(tiny)
    schemas = whole["components"]["schemas"]

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "$ref" and isinstance(inner, str):
                    yield inner
                else:
                    yield from references(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from references(inner)

    found = list(references(whole))
    assert len(found) > len(schemas) / 2
    for reference in found:
        assert reference.startswith("#/components/schemas/")
        assert reference.rsplit("/", 1)[1] in schemas


def test_the_server_keeps_to_its_document(url: str) -> None:
    statuses: Counter[str] = Counter()
    with operations(url) as every:
        for operation in every:
            assert exercise(operation, 3, statuses) >= 1
    assert any(label.endswith(" 200") for label in statuses)
    assert any(label.endswith(" 400") for label in statuses)


@pytest.mark.slow
def test_the_server_keeps_to_its_document_in_thousands_of_cases(url: str) -> None:
    statuses: Counter[str] = Counter()
    with operations(url) as every:
        tried = sum(exercise(operation, 250, statuses) for operation in every)
    print(f"{tried} cases", dict(statuses))
    assert tried >= 5000


def test_the_api_reference_is_current(tiny: LocalTextEngine) -> None:
    from foretell.server.reference import reference

    made = reference(document(tiny))
    assert REFERENCE.read_text() == made, (
        "docs/api.md is out of date: run python -m foretell.server.reference docs/api.md"
    )
