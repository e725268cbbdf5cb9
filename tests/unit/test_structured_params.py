"""The form of an output as plain data: what is refused before anything is compiled."""

from __future__ import annotations

import json

import pytest

from foretell import SamplingParams, StructuredOutput
from foretell.core.structured import MAX_BYTES, MAX_CHOICES, MAX_DEPTH, MAX_NODES, MAX_REGEX_BYTES, schema_depth
from foretell.errors import InvalidRequestError


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_schemas_come_as_objects_or_text() -> None:
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}}
    given = StructuredOutput.json_schema(schema)
    assert json.loads(given.value) == schema
    assert StructuredOutput.json_schema(given.value) == given
    assert StructuredOutput("choice", '["a", "b"]') == StructuredOutput.choice(["a", "b"])


def test_depth_counts_containers() -> None:
    assert [schema_depth(v) for v in ("x", {}, {"a": 1}, {"a": [1]}, [])] == [0, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "value", "part"),
    [
        ("yaml", "x", "unknown"),
        ("regex", "", "is empty"),
        ("regex", "a" * (MAX_REGEX_BYTES + 1), "bytes"),
        ("grammar", "a" * (MAX_BYTES + 1), "bytes"),
        ("grammar", "é" * (MAX_BYTES // 2 + 1), "bytes"),
        ("json_object", "{}", "takes no value"),
        ("json_schema", "{", "no valid JSON"),
        ("json_schema", "NaN", "no valid JSON"),
        ("json_schema", "[]", "is an object"),
        ("json_schema", "[" * 30_000, "nested"),
        ("json_schema", json.dumps(nested(MAX_DEPTH)), "nested"),
        ("json_schema", json.dumps({"enum": list(range(MAX_NODES))}), "values"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", 1]', "texts"),
        ("choice", '[""]', "texts"),
        ("choice", json.dumps([str(i) for i in range(MAX_CHOICES + 1)]), "choices"),
    ],
)
def test_what_is_no_such_form_is_refused_in_one_line(kind: str, value: str, part: str) -> None:
    with pytest.raises(InvalidRequestError, match=part) as caught:
        StructuredOutput(kind, value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_deepest_schema_allowed_is_taken() -> None:
    assert StructuredOutput("json_schema", json.dumps(nested(MAX_DEPTH - 1))).kind == "json_schema"


def test_a_schema_that_is_its_own_part_is_refused() -> None:
    schema: dict[str, object] = {}
    schema["items"] = schema
    with pytest.raises(InvalidRequestError):
        StructuredOutput.json_schema(schema)


def test_pooling_excludes_what_only_outputs_have() -> None:
    assert SamplingParams(pooling="mean").pooling == "mean"
    for bad in ({"pooling": "max"}, {"pooling": "mean", "logprobs": 1}, {"pooling": "last", "n": 2}):
        with pytest.raises(InvalidRequestError, match="pooling"):
            SamplingParams(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="structured"):
        SamplingParams(structured="json")  # type: ignore[arg-type]
