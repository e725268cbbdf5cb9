"""Request bodies, read and parsed within limits. What is no clean JSON is refused before anything looks at it."""

from __future__ import annotations

import asyncio
import json
import math
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from foretell.server.errors import ApiError, ClientGoneError

if TYPE_CHECKING:
    from fastapi import Request

    from foretell.server.config import ServerConfig

Model = TypeVar("Model", bound=BaseModel)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)  # also one that never ends
_ASIDE_BYTES = 64 << 10  # larger bodies are parsed in a thread, or others would wait
_MAX_NUMBER_CHARS = 40  # longer ones are bombs or noise: 2^64 has 20 digits


async def parse(request: Request, model: type[Model], config: ServerConfig) -> Model:
    """The request's body as ``model``; ApiError (400, 408, 413, 415) if it is not one."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "the body must be JSON: send Content-Type: application/json", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "compressed bodies are not read: send it as it is", code="unsupported_media_type")
    body = await read_body(request, config)
    if len(body) <= _ASIDE_BYTES:
        return _parsed(body, model, config)
    return await asyncio.to_thread(_parsed, body, model, config)


def _parsed(body: bytes, model: type[Model], config: ServerConfig) -> Model:
    check_size(body, config.max_json_values)
    return validate(model, parse_json(body, config.max_json_depth, config.max_object_keys))


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """All of the body; reading stops at the limit, whatever Content-Length says."""
    too_large = ApiError(
        413,
        f"the body is larger than {config.max_body_bytes} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and (len(stated) > 18 or int(stated) > config.max_body_bytes):
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout_seconds):
            async for part in request.stream():
                size += len(part)
                if size > config.max_body_bytes:
                    raise too_large
                parts.append(part)
    except ClientDisconnect:
        raise ClientGoneError from None
    except TimeoutError:
        raise ApiError(
            408, f"the body took longer than {config.body_timeout_seconds:g} s", headers={"connection": "close"}
        ) from None
    return b"".join(parts)


def check_size(body: bytes, max_values: int) -> None:
    """ApiError 400 for a body of more than so many values. It is counted before anything is made of it, from the
    punctuation outside strings (a list in a list counts twice); text may be as long as the body."""
    if len(body) <= max_values:
        return
    too_many = body.count(b'"') - body.count(b'\\"') > 4 * max_values  # quickly: a value has at most a key and a text
    if not too_many:
        rest = _STRINGS.sub(b"", body)
        too_many = sum(rest.count(mark) for mark in (b",", b"[", b"{")) > max_values
    if too_many:
        raise ApiError(400, f"the body holds more than {max_values} values: send less at once", code="too_large")


def parse_json(body: bytes, max_depth: int, max_keys: int = 8192) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, no key twice, no lone surrogates, no huge numbers, bounded depth."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=partial(_unique, max_keys),
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_int,
        )
    except UnicodeDecodeError as error:
        raise _bad(f"it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _bad(f"it is nested deeper than {max_depth} levels") from None
    except json.JSONDecodeError as error:
        raise _bad(f"{error.msg} at character {error.pos}") from None
    if depth(value, max_depth) > max_depth:
        raise _bad(f"it is nested deeper than {max_depth} levels")
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _bad("it holds lone surrogates, which are no Unicode text") from None
    return value


def depth(value: Any, limit: int) -> int:
    """How deep lists and objects nest in ``value``: 0 for a plain value, ``limit + 1`` for anything deeper."""
    level, layer = 0, [value] if isinstance(value, (list, dict)) else []
    while layer and level <= limit:
        level += 1
        inner = (item for box in layer for item in (box.values() if isinstance(box, dict) else box))
        layer = [item for item in inner if isinstance(item, (list, dict))]
    return level


def validate(model: type[Model], value: Any) -> Model:
    """ApiError with the first fault in one line, and the field's name."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid(error, value) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def invalid(error: ValidationError, value: Any) -> ApiError:
    """The most telling of pydantic's complaints about ``value``: of a union, the branch that got furthest, and there
    rather what is wrong with a value of the right type."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    fault = max(
        faults, key=lambda f: (f["type"] == "extra_forbidden", len(f["loc"]), not f["type"].endswith("_type"))
    )
    param = _field(fault["loc"], value, missing=fault["type"] == "missing")
    if fault["type"] in ("extra_forbidden", "none_required"):
        return ApiError(
            400, f"{param} is not a parameter that this server supports", param=param, code="unsupported_parameter"
        )
    message = fault["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:400]
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _field(location: tuple[int | str, ...], value: Any, *, missing: bool) -> str | None:
    """The names on the way to a fault, without pydantic's own for the branches of unions."""
    names = []
    for part in location:
        if isinstance(part, int) if isinstance(value, list) else isinstance(value, dict) and part in value:
            names.append(str(part))
            value = value[part]
    return ".".join([*names, str(location[-1])] if missing else names)[:200] or None


def _bad(why: str) -> ApiError:
    return ApiError(400, f"the body is no valid JSON: {why}", code="invalid_json")


def _unique(max_keys: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > max_keys:
        raise ApiError(400, f"an object of the body has more than {max_keys} keys", code="too_large")
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _bad("an object has the same key twice")
    return found


def _constant(name: str) -> NoReturn:
    raise _bad(f"{name} is no JSON number")


def _float(text: str) -> float:
    value = float(text) if len(text) <= 400 else math.inf
    if not math.isfinite(value):
        raise _bad("a number is too large")
    return value


def _int(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise _bad("a number is too large")
    return int(text)
