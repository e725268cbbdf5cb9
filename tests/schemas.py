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
