"""Tool calls, and how the bodies of each format are read. A reader gives None for what is no call."""

from __future__ import annotations

import ast
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

MAX_NAME_CHARS: Final = 256
MAX_BODY_CHARS: Final = 1 << 20
MAX_PYTHONIC_CHARS: Final = 64 << 10
MAX_PYTHONIC_DEPTH: Final = 32

_CALL_BEGIN, _CALL_SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_XML_CALL: Final = re.compile(r"\s*<function=([^>\s]{1,256})>(.*)</function>\s*", re.DOTALL)
_XML_PARAMETER: Final = re.compile(r"\s*<parameter=([^>\s]{1,256})>")
_XML_PARAMETER_END: Final = "</parameter>"
_DOTTED: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_NAMED: Final = re.compile(r"\s*([^\s\[{]+)\s*(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of tool call number ``index``; ``id`` and ``name`` come with the first, ``arguments`` in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A whole call; ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def read_json(body: str) -> list[Call] | None:
    """One object with a name and its arguments (or parameters), or a list of such."""
    value = _loads(body)
    items = value if isinstance(value, list) else [value]
    return _all(_call_of(item) for item in items)


def read_json_or_xml(body: str) -> list[Call] | None:
    """JSON as above, or ``<function=name><parameter=key>value</parameter></function>``."""
    found = _XML_CALL.fullmatch(body)
    if found is None:
        return read_json(body)
    arguments, text, at = {}, found[2], 0
    while (parameter := _XML_PARAMETER.match(text, at)) is not None:  # one after the other: a search would start
        end = text.find(_XML_PARAMETER_END, parameter.end())  # again at every one that has no end
        if end < 0:
            return None
        arguments[parameter[1]] = _plain_value(text[parameter.end() : end])
        at = end + len(_XML_PARAMETER_END)
    return None if text[at:].strip() else _all([_made(found[1], arguments)])


def read_named(body: str) -> list[Call] | None:
    """JSON as above, or a name in front of its arguments: ``name[ARGS]{…}``."""
    found = _NAMED.fullmatch(body)
    return read_json(body) if found is None else _all([_made(found[1], _loads(found[2]))])


def read_deepseek(body: str) -> list[Call] | None:
    """Calls between their own tags: ``name SEP {…}``, or ``function SEP name`` and the arguments in a code fence."""
    before, *rest = body.split(_CALL_BEGIN)
    if before.strip():
        return None
    calls = []
    for text in rest:
        call, _, after = text.partition(_CALL_END)
        name, separator, arguments = call.partition(_CALL_SEP)
        if not separator or after.strip():
            return None
        if "```" in arguments:
            name, _, fenced = arguments.partition("```")
            arguments = fenced.rstrip().removeprefix("json").removesuffix("```")
        calls.append(_made(name.strip(), _loads(arguments)))
    return _all(calls)


def read_pythonic(body: str) -> list[Call] | None:
    """``[f(a=1), g(b="x")]``: parsed as Python, never run; arguments are named and plain values."""
    if len(body) > MAX_PYTHONIC_CHARS or _nesting(body) > MAX_PYTHONIC_DEPTH:
        return None
    try:
        tree = ast.parse(body.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        return _all([_python_call(item) for item in tree.elts])
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr) -> Call | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    name = ast.unparse(node.func)
    if not _DOTTED.fullmatch(name) or any(keyword.arg is None for keyword in node.keywords):
        return None
    return _made(name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords})


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _call_of(item: Any) -> Call | None:
    if not isinstance(item, dict):
        return None
    if isinstance(item.get("function"), dict):  # {"type": "function", "function": {…}}
        item = item["function"]
    key = next((key for key in ("arguments", "parameters") if key in item), None)
    return None if key is None else _made(item.get("name"), item[key])


def _made(name: object, arguments: object) -> Call | None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return None
    if isinstance(arguments, str):  # encoded twice
        arguments = _loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        return None
    try:
        return Call(name, json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        return None


def _all(calls: Any) -> list[Call] | None:
    """Every one must be a call, and there must be one."""
    found: Sequence[Call | None] = list(calls)
    whole = [call for call in found if call is not None]
    return whole if whole and len(whole) == len(found) else None


_BAD: Final = object()


def _loads(text: str) -> Any:
    """The JSON value; an object that is no JSON value if ``text`` is none."""
    try:
        return json.loads(text, parse_constant=_refuse) if len(text) <= MAX_BODY_CHARS else _BAD
    except (ValueError, RecursionError):
        return _BAD


def _refuse(name: str) -> float:
    raise ValueError(name)


def _plain_value(text: str) -> Any:
    """What is written as JSON is that value, anything else is text, less the line breaks around it."""
    text = text.removeprefix("\n").removesuffix("\n")
    value = _loads(text)
    return text if value is _BAD else value
