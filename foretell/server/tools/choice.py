"""tool_choice "required", or a tool by name: the answer is constrained to a call, which always parses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foretell.core.structured import StructuredOutput, check_schema
from foretell.errors import InvalidRequestError


def tool_choice_schema(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any], *, parallel: bool = True
) -> StructuredOutput:
    """The form of an answer that calls at least one of ``tools`` (OpenAI's function objects): a JSON list of objects
    with name and parameters, which the "json" format reads. ``tool_choice``: "required", or {"name": …}, which is
    called once. InvalidRequestError for a name that is not there, or a schema beyond the limits."""
    functions = [tool["function"] for tool in tools]
    if isinstance(tool_choice, Mapping):
        functions = [f for f in functions if f["name"] == tool_choice["name"]]
        if not functions:
            name = str(tool_choice["name"])[:64]
            raise InvalidRequestError(f"tool_choice names {name!r}, which is not among the tools")
    schemas: dict[str, Any] = {}
    calls = []
    for number, function in enumerate(functions):
        name = f"tool_{number}"
        schemas[name] = _parameters(function, name)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "parameters": {"$ref": f"#/$defs/{name}"}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    once = isinstance(tool_choice, Mapping) or not parallel
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    schema = {"type": "array", "items": items, "minItems": 1, **({"maxItems": 1} if once else {}), "$defs": schemas}
    return StructuredOutput.json_schema(schema)


def _parameters(function: Mapping[str, Any], name: str) -> Any:
    """The schema of a tool's arguments, with references to itself pointing to where it is put."""
    schema = function.get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    check_schema(schema)
    return _moved(schema, f"#/$defs/{name}")


def _moved(value: Any, root: str) -> Any:
    if isinstance(value, dict):
        moved = {key: _moved(inner, root) for key, inner in value.items()}
        target = value.get("$ref")
        if isinstance(target, str) and target.startswith("#"):
            moved["$ref"] = root + target[1:]
        return moved
    return [_moved(item, root) for item in value] if isinstance(value, list) else value
