"""A form as the grammar text that llguidance compiles."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

    from foretell.core.structured import StructuredOutput

# Between the parts of a JSON text: nothing, one space, or a new line with its indentation. Any amount of white
# space is JSON as well, but a small model that may write white space for ever sometimes does.
WHITE_SPACE: Final = r"( |\n {0,16})?"
_JSON_OPTIONS: Final[JsonCompileOptions] = {
    "whitespace_pattern": WHITE_SPACE,
    "whitespace_flexible": True,
    "lenient": False,
    "coerce_one_of": False,  # oneOf is taken where its parts exclude each other, never weakened to anyOf
}
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions")  # name → schema
_VALUES: Final = ("enum", "const", "default", "examples", "example")  # hold no schemas
_NOTES: Final = ("int32", "int64", "float", "double", "byte", "binary", "password")  # formats that constrain nothing

_ESCAPED: Final = re.compile(r"\\.", re.DOTALL)
# in brackets of their own, which may stand within others
_CLASSES: Final = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[A-Za-z0-9_]", r"\W": "[^A-Za-z0-9_]"}


def grammar_text(form: StructuredOutput) -> str:
    """Raises ValueError, or an error of llguidance's own, where the form is no such thing."""
    from llguidance import LLMatcher

    match form.kind:
        case "json_schema":
            schema = plain_schema(json.loads(form.value))
            return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(ascii_classes(form.value))
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, json.loads(form.value))))
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(form.value))


def plain_schema(schema: Any) -> dict[str, Any]:
    """The same schema without what says nothing, which the compiler would refuse."""
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise ValueError("no value conforms to the schema false")
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if (key == "uniqueItems" and value is False) or (key == "format" and value in _NOTES):
            continue
        if key in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
            raise ValueError(f"{key} is a number, the limit itself: true and false are of an old draft")
        if key == "pattern" and isinstance(value, str):
            plain[key] = ascii_classes(value)
        elif key == "patternProperties" and isinstance(value, dict):
            plain[key] = {ascii_classes(name): _inner(part) for name, part in value.items()}
        elif key in _MAPS and isinstance(value, dict):
            plain[key] = {name: _inner(part) for name, part in value.items()}
        else:
            plain[key] = value if key in _VALUES else _inner(value)
    return plain


def ascii_classes(pattern: str) -> str:
    """``\\d`` and ``\\w`` as JSON Schema has them (ECMA 262): of ASCII. The compiler takes every script's, and
    a model that would rather write something else writes digits of scripts that nobody asked for."""
    return _ESCAPED.sub(lambda found: _CLASSES.get(found[0], found[0]), pattern)


def _inner(value: Any) -> Any:
    if isinstance(value, list):
        return [_inner(item) for item in value]
    return plain_schema(value) if isinstance(value, dict) else value


def _lark(text: str) -> str:
    """GBNF (``root ::= …``) is translated; Lark is taken as it is."""
    from llguidance.gbnf_to_lark import any_to_lark

    return any_to_lark(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
