"""What form an output must have: plain data, checked for size before anything is compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from foretell.errors import InvalidRequestError

StructureKind = Literal["json_schema", "json_object", "regex", "grammar", "choice"]
KINDS: Final = get_args(StructureKind)
MAX_BYTES: Final = 64 << 10
MAX_REGEX_BYTES: Final = 8 << 10
MAX_DEPTH: Final = 32  # of a schema's nesting
MAX_NODES: Final = 8192  # values in a schema, however nested
MAX_MEMBERS: Final = 512  # of one object in a schema: its properties, for one
MAX_ALTERNATIVES: Final = 256  # of one anyOf, oneOf or allOf
MAX_CHOICES: Final = 1024


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form an output must have. ``value`` by ``kind``:

    json_schema: a JSON schema, as JSON text. json_object: "" (any object). regex: an expression that the whole
    output matches. grammar: a grammar in Lark's notation, or in GBNF (``root ::= …``). choice: a JSON list of
    strings. Raises InvalidRequestError for a value that is no such thing, or is too large.
    """

    kind: StructureKind
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequestError(f"structured output {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if not isinstance(self.value, str):
            raise InvalidRequestError(f"structured output is given as text, got {type(self.value).__name__}")
        size = len(self.value.encode("utf-8", "surrogatepass"))
        limit = MAX_REGEX_BYTES if self.kind == "regex" else MAX_BYTES
        if size > limit:
            raise InvalidRequestError(f"the {self.kind} has {size:,} bytes, more than {limit:,}: make it smaller")
        if self.kind == "json_object":
            if self.value:
                raise InvalidRequestError("json_object takes no value: use json_schema to say which object")
        elif not self.value.strip():
            raise InvalidRequestError(f"the {self.kind} is empty")
        if self.kind == "json_schema":
            check_schema(_parsed(self.value, "json_schema"))
        elif self.kind == "choice":
            _check_choices(_parsed(self.value, "choice"))

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> StructuredOutput:
        """JSON that conforms to ``schema``, given as an object or as JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else _as_json(schema, "json_schema"))

    @classmethod
    def json_object(cls) -> StructuredOutput:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, pattern: str) -> StructuredOutput:
        """Text that ``pattern`` matches from its beginning to its end."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, text: str) -> StructuredOutput:
        """Text of a grammar in Lark's notation, or in GBNF."""
        return cls("grammar", text)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> StructuredOutput:
        """One of these texts."""
        return cls("choice", _as_json(list(choices), "choice"))


def schema_depth(schema: object) -> int:
    """Nesting of a parsed JSON value: 0 for a plain one. Its cost is linear, its own depth is not limited."""
    depth, level = -1, [schema]
    while level:
        depth += 1
        level = [child for value in level for child in _children(value)]
    return depth


def check_schema(schema: object, *, max_depth: int = MAX_DEPTH, max_nodes: int = MAX_NODES) -> None:
    """InvalidRequestError for what is no JSON schema, or is one beyond the limits."""
    if not isinstance(schema, (dict, bool)):
        raise InvalidRequestError('a JSON schema is an object such as {"type": "object"}')
    nodes, depth, level = 0, -1, [schema]
    while level:
        depth += 1
        nodes += len(level)
        if depth > max_depth:
            raise InvalidRequestError(f"the JSON schema is nested more than {max_depth} deep: make it flatter")
        if nodes > max_nodes:
            raise InvalidRequestError(f"the JSON schema holds more than {max_nodes:,} values: make it smaller")
        for value in level:
            if isinstance(value, dict):
                _check_width(value)
        level = [child for value in level for child in _children(value)]


def _check_width(schema: dict[str, Any]) -> None:
    if len(schema) > MAX_MEMBERS:
        raise InvalidRequestError(f"an object in the JSON schema has {len(schema):,} members, at most {MAX_MEMBERS}")
    for name in ("anyOf", "oneOf", "allOf"):
        count = len(_children(schema.get(name)))
        if count > MAX_ALTERNATIVES:
            raise InvalidRequestError(f"{name} in the JSON schema has {count:,} parts, at most {MAX_ALTERNATIVES}")


def _children(value: object) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _check_choices(choices: object) -> None:
    if not isinstance(choices, list) or not choices:
        raise InvalidRequestError("a choice is a list of at least one text")
    if len(choices) > MAX_CHOICES:
        raise InvalidRequestError(f"at most {MAX_CHOICES:,} choices, got {len(choices):,}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InvalidRequestError("choices are texts of at least one character")


def _parsed(text: str, kind: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidRequestError(f"the {kind} is nested more than {MAX_DEPTH} deep: make it flatter") from None
    except ValueError as error:
        raise InvalidRequestError(f"the {kind} is no valid JSON: {str(error).splitlines()[0][:200]}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _as_json(value: object, kind: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InvalidRequestError(f"the {kind} is nested more than {MAX_DEPTH} deep: make it flatter") from None
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"the {kind} cannot be written as JSON: {error}") from None
