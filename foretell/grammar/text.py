"""A form as the grammar text that llguidance compiles."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

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
    "coerce_one_of": True,
}


def grammar_text(form: StructuredOutput) -> str:
    """Raises ValueError, or an error of llguidance's own, where the form is no such thing."""
    from llguidance import LLMatcher

    match form.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(form.value, overrides=_JSON_OPTIONS)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(form.value)
        case "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, json.loads(form.value))))
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(form.value))


def _lark(text: str) -> str:
    """GBNF (``root ::= …``) is translated; Lark is taken as it is."""
    from llguidance.gbnf_to_lark import any_to_lark

    return any_to_lark(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
