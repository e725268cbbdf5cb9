"""Which form an output must have, read from the five ways to ask for one, within limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from foretell.core.structured import StructuredOutput, StructureKind
from foretell.server.errors import ApiError
from foretell.server.limits import depth
from foretell.server.protocol.structured import JsonObjectFormat, JsonSchemaFormat

if TYPE_CHECKING:
    from foretell.server.config import ServerConfig
    from foretell.server.protocol.sampling import SamplingFields


def structured_output(fields: SamplingFields, config: ServerConfig) -> StructuredOutput | None:
    """None if the text is free; ApiError 400 if it is bound in two ways, or by more than the limits allow."""
    asked = _asked(fields)
    if not asked:
        return None
    if len(asked) > 1:
        names = " and ".join(name for name, _, _ in asked)
        raise ApiError(400, f"{names} contradict each other: give one of them", param=asked[0][0])
    param, kind, value = asked[0]
    text = check_schema_size(param, value, config) if kind != "json_object" else ""
    return StructuredOutput(kind, text)


def _asked(fields: SamplingFields) -> list[tuple[str, StructureKind, Any]]:
    """(parameter, kind, value) of each constraint that the request states."""
    form, outputs = fields.response_format, fields.structured_outputs
    stated: list[tuple[str, StructureKind, Any]] = [
        ("guided_json", "json_schema", fields.guided_json),
        ("guided_regex", "regex", fields.guided_regex),
        ("guided_choice", "choice", fields.guided_choice),
        ("guided_grammar", "grammar", fields.guided_grammar),
    ]
    if isinstance(form, JsonObjectFormat):
        stated.append(("response_format", "json_object", {}))
    elif isinstance(form, JsonSchemaFormat):
        stated.append(("response_format", "json_schema", form.json_schema.json_schema or {}))
    if outputs is not None:
        stated += [
            ("structured_outputs.json", "json_schema", outputs.json_),
            ("structured_outputs.regex", "regex", outputs.regex),
            ("structured_outputs.choice", "choice", outputs.choice),
            ("structured_outputs.grammar", "grammar", outputs.grammar),
            ("structured_outputs.json_object", "json_object", {} if outputs.json_object else None),
        ]
    return [entry for entry in stated if entry[2] is not None]


def check_schema_size(param: str, value: Any, config: ServerConfig) -> str:
    """``value`` as text, if it is within max_schema_bytes and max_schema_depth."""
    return _text_within(param, value, config.max_schema_bytes, config.max_schema_depth)


def check_tools_size(tools: list[dict[str, Any]], config: ServerConfig) -> None:
    """ApiError if they are beyond max_tool_bytes, or their schemas, a few levels in, beyond max_schema_depth. How
    large the schemas may be is asked when a call is required, for they are compiled only then."""
    _text_within("tools", tools, config.max_tool_bytes, config.max_schema_depth, inner=3)


def _text_within(param: str, value: Any, max_bytes: int, max_depth: int, *, inner: int = 0) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    size = len(text.encode())
    if size > max_bytes:
        raise ApiError(400, f"{param} has {size} bytes and {max_bytes} are allowed", param=param, code="too_large")
    if depth(value, max_depth + inner) > max_depth + inner:
        raise ApiError(400, f"{param} is nested deeper than {max_depth} levels", param=param, code="too_deep")
    return text
