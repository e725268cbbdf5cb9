"""Random JSON schemas whose instances are bounded in length."""

from __future__ import annotations

from random import Random
from typing import Any

NAMES = ("name", "age", "city", "tags", "ok", "size", "note", "ünïcode", "a b", 'q"uote', "back\\slash", "items")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z]{3}-[0-9]{4}$", "^(yes|no)!?$", "^\\d{1,3}(\\.\\d{1,2})?$")


def random_schema(rng: Random, depth: int = 3) -> dict[str, Any]:
    """An object at the top; nested no deeper than ``depth``."""
    return _object(rng, depth)


def _any(rng: Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _plain, _choice, _constant]
    if depth > 0:
        kinds += [_object, _array, _union]
    return rng.choice(kinds)(rng, depth)


def _object(rng: Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 5))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 3)}


def _union(rng: Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _string(rng: Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if rng.random() < 0.2:
        return {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 20)}


def _integer(rng: Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _number(rng: Random, depth: int) -> dict[str, Any]:
    low = round(rng.uniform(-100, 100), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(1, 50), 2)}


def _plain(rng: Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}


def _choice(rng: Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, "x y", "ß"], rng.randint(1, 4))}


def _constant(rng: Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 7, False, 'quo"te'])}


# --- whatever the keywords say -------------------------------------------------------------------------------

DEFINITIONS = {
    "list": {
        "type": "object",
        "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/list"}]}},
        "required": ["next"],
        "additionalProperties": False,
    },
    "short": {"type": "string", "maxLength": 3},
}
EXPRESSIONS = (
    "a",
    "^a",
    "b$",
    "^[a-c]+$",
    r"\d{2}",
    r"^\w{1,3}$",
    "x|y",
    "^(ab)*$",
    "[^a]$",
    "^.{2}$",
    r"^\S+\s\S+$",
)
VALUES = (1, 2, "a", "b", None, True, [1], {"a": 1}, 1.5)


def wide_schema(rng: Random, depth: int = 2) -> dict[str, Any]:
    """Most keywords there are, in combinations that may exclude each other, or mean nothing."""
    return {"$defs": DEFINITIONS, **_wide(rng, depth)}


def _wide(rng: Random, depth: int) -> dict[str, Any]:
    leaves = [_wide_string, _wide_number, _wide_values]
    nested = [_wide_object, _pattern_object, _array, _tuple, _combination]
    return rng.choice(leaves if depth <= 0 else leaves + 2 * nested)(rng, depth)


def _wide_string(rng: Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string", "maxLength": rng.randint(2, 8)}
    if rng.random() < 0.4:
        schema["minLength"] = rng.randint(0, 2)
    if rng.random() < 0.5:
        schema["pattern"] = rng.choice(EXPRESSIONS)
    return schema


def _wide_number(rng: Random, depth: int) -> dict[str, Any]:
    kind, low = rng.choice(["integer", "number"]), rng.randint(-30, 30)
    if rng.random() < 0.3:
        return {"type": kind, "multipleOf": rng.choice([2, 3, 7, 0.5]), "minimum": 0, "maximum": 50}
    lower, upper = rng.choice(["minimum", "exclusiveMinimum"]), rng.choice(["maximum", "exclusiveMaximum"])
    return {"type": kind, lower: low, upper: low + rng.randint(2, 300)}


def _wide_values(rng: Random, depth: int) -> dict[str, Any]:
    plain = {"type": rng.choice(["boolean", "null", ["boolean", "null"]])}
    named = {"$ref": rng.choice(["#/$defs/list", "#/$defs/short"])}
    return rng.choice([{"enum": rng.sample(VALUES, rng.randint(1, 4))}, {"const": rng.choice(VALUES)}, plain, named])


def _wide_object(rng: Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["a", "b", "ab", "x-1", "é"], rng.randint(0, 3))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _wide(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.5],
        "additionalProperties": rng.choice([False, False, _wide(rng, 0)]),
    }
    if rng.random() < 0.4:
        schema[rng.choice(["minProperties", "maxProperties"])] = rng.randint(0, 3)
    return schema


def _pattern_object(rng: Random, depth: int) -> dict[str, Any]:
    others = rng.choice([False, {"type": "integer", "minimum": 0, "maximum": 9}])
    return {
        "type": "object",
        "patternProperties": {rng.choice(["^a", "b$", "^x-"]): _wide(rng, depth - 1)},
        "additionalProperties": others,
        "maxProperties": 2,
    }


def _tuple(rng: Random, depth: int) -> dict[str, Any]:
    first = [_wide(rng, depth - 1) for _ in range(rng.randint(1, 2))]
    return {"type": "array", "prefixItems": first, "items": rng.choice([False, _wide(rng, 0)]), "maxItems": 3}


def _combination(rng: Random, depth: int) -> dict[str, Any]:
    return {rng.choice(["anyOf", "oneOf", "allOf"]): [_wide(rng, depth - 1) for _ in range(2)]}
