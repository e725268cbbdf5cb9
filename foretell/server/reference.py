"""docs/api.md, made from the OpenAPI document: ``python -m foretell.server.reference docs/api.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_NO_LIMIT = 2**31  # a bound as far off as this says only that the number fits the machine
INTRODUCTION = """# HTTP API

Made from the OpenAPI document of the server, which `GET /openapi.json` gives; do not edit by hand.

Every route but `/health` needs a key where keys are configured, as `Authorization: Bearer KEY` or `x-api-key: KEY`.
Without keys the server listens on loopback only, answers local Host names only, and refuses `/admin/…`.
Bodies are `application/json`; a field that is not listed here is refused by its name, as is JSON with NaN, Infinity,
a key twice, lone surrogates or invalid UTF-8. Answers carry `x-request-id`, which is made here; a client's own
`x-request-id` or `x-client-request-id` comes back as `x-client-request-id` and is used for nothing.

A stream that fails half-way ends with an error event and without `[DONE]`. Closing the connection ends the request.
Errors have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`; under `/v1/messages`, Anthropic's.
"""


def reference(document: dict[str, Any]) -> str:
    """The whole page."""
    schemas = document["components"]["schemas"]
    parts = [INTRODUCTION]
    shown: list[str] = []
    for path, entry in document["paths"].items():
        for method, operation in entry.items():
            parts.append(_operation(method, path, operation, schemas, shown))
    parts.append("## Objects\n")
    parts.extend(_object(name, schemas, shown) for name in shown)  # grows while it is read: objects name objects
    return "\n".join(parts)


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any], shown: list[str]) -> str:
    lines = [f"## `{method.upper()} {path}`\n", f"{operation['summary']}.\n"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    if name := _name(body):
        lines += [f"Request: `{name}`\n", *_fields(schemas[name], shown), ""]
    for status, answer in operation["responses"].items():
        kinds = []
        for kind, content in answer.get("content", {}).items():
            said = content.get("schema", {}).get("description")
            kinds.append(f"{_type(content.get('schema', {}), shown)} ({kind})" if said is None else said)
        text = "; ".join(kinds) if int(status) < 400 else answer["description"]
        lines.append(f"- {status}: {text}")
    return "\n".join(lines) + "\n"


def _object(name: str, schemas: dict[str, Any], shown: list[str]) -> str:
    return "\n".join([f"### `{name}`\n", *_fields(schemas[name], shown)]) + "\n"


def _fields(schema: dict[str, Any], shown: list[str]) -> Iterable[str]:
    if description := schema.get("description"):
        yield " ".join(description.split()) + "\n"
    if "properties" not in schema:
        yield f"{_type(schema, shown)}"
        return
    yield "| field | type | |"
    yield "| --- | --- | --- |"
    required = schema.get("required", [])
    for name, field in schema["properties"].items():
        notes = ["required"] if name in required else []
        notes += [" ".join(field["description"].split())] if "description" in field else []
        yield f"| `{name}` | {_type(field, shown)} | {'; '.join(notes)} |"


def _type(schema: dict[str, Any], shown: list[str]) -> str:
    """A schema in a few words; objects that it names are remembered in ``shown``."""
    if name := _name(schema):
        if name not in shown:
            shown.append(name)
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(option, shown) for option in schema[key]))
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{_json(value)}`" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}), shown)}{_bounds(schema, 'minItems', 'maxItems')}"
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_type(inner, shown)}" if isinstance(inner, dict) and inner else "object"
    if kind == "string":
        return f"string{_bounds(schema, 'minLength', 'maxLength')}"
    return f"{kind}{_range(schema)}"


def _name(schema: dict[str, Any]) -> str | None:
    return schema["$ref"].rsplit("/", 1)[1] if "$ref" in schema else None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _bounds(schema: dict[str, Any], low: str, high: str) -> str:
    told = [f"≥ {schema[low]}"] if low in schema else []
    told += [f"≤ {schema[high]}"] if high in schema else []
    return f" ({', '.join(told)} long)" if told else ""


def _range(schema: dict[str, Any]) -> str:
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    told = [f"{sign} {schema[key]}" for key, sign in words.items() if abs(schema.get(key, _NO_LIMIT)) < _NO_LIMIT]
    return f" ({', '.join(told)})" if told else ""


def main(path: str) -> None:
    from foretell.server.app import create_app

    Path(path).write_text(reference(create_app(None).openapi()))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1])
