"""schemathesis over the OpenAPI document of a running server: requests that fit it, and some that do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from foretell.server.config import ServerConfig

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,  # only statuses that the document names
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,  # bodies fit their models
    checks.negative_data_rejection,  # what the document forbids is refused
    checks.unsupported_method,
]
KEY, MODEL = "sk-of-the-campaign", "tiny"
HEADERS = {"authorization": f"Bearer {KEY}"}
CONFIG = ServerConfig(api_keys=(KEY,), served_model_names=(MODEL,))
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


@contextmanager
def operations(url: str) -> Iterator[list[Any]]:
    """Every operation of the document that the server at ``url`` gives."""
    document = httpx.get(url + "/openapi.json", headers=HEADERS, timeout=60).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=url)
    yield [found.ok() for found in schema.get_all_operations()]


def exercise(operation: Any, cases: int, statuses: Counter[str]) -> int:
    """Up to ``cases`` cases in each mode; the number tried. Raises at the first violation."""
    tried = 0
    for mode in MODES:

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            nonlocal tried
            tried += 1
            if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                case.body["model"] = MODEL  # or hardly a request would get past the model's name
            answer = case.call(headers=HEADERS)
            statuses[f"{operation.label} {answer.status_code}"] += 1
            case.validate_response(answer, checks=CHECKS)

        try:
            attempt()
        except Unsatisfiable:  # an operation without parameters cannot be asked wrongly
            continue
    return tried
