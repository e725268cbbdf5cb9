"""Requests that nobody means well: one generator for the tests and for the campaign.

``hostile(random)`` gives the raw bytes of one HTTP request. Whatever it is, the server must answer with JSON that is
no 5xx of its own making, or close the connection where the bytes are not HTTP at all, and go on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from foretell.server.protocol.chat import ChatCompletionRequest
from foretell.server.protocol.completions import CompletionRequest
from foretell.server.protocol.embeddings import EmbeddingRequest
from foretell.server.protocol.tokenize import TokenizeRequest

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16, "model": "tiny"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 2, "model": "tiny"},
    "/v1/messages/count_tokens": {"messages": HELLO, "model": "tiny"},
    "/v1/embeddings": {"input": "Hello"},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [1, 2]},
    "/admin/policy": {"policy": "mixed"},
    "/admin/steps": {"keep": 0},
}
FIELDS = (
    "n", "best_of", "logprobs", "top_logprobs", "prompt_logprobs", "max_tokens", "max_completion_tokens",
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "logit_bias",
    "seed", "stop",
    "stop_token_ids", "allowed_token_ids", "bad_words", "prompt", "messages", "input", "tokens", "model", "stream",
    "stream_options", "echo", "suffix", "user", "priority", "timeout_seconds", "tools", "tool_choice",
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "chat_template", "chat_template_kwargs", "continue_final_message", "dimensions", "encoding_format", "policy",
    "request_id", "user_id", "metadata", "system", "instructions", "previous_response_id", "include", "thinking",
)  # fmt: skip
_TREE = {"$defs": {"T": {"type": "array", "items": {"$ref": "#/$defs/T"}}}, "$ref": "#/$defs/T"}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**38, 1e308, -0.0, 0.5, "", "x", "\x00",
    "🦀" * 50,
    "x" * 3000, [], {}, [[]], [{}], [None], [1, "a"], ["x"] * 300, list(range(5000)), {"a": {"b": {"c": []}}},
    {str(i): i for i in range(5000)}, {"-1": 1}, {"1e3": 1}, {"١": 5},
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for i in range(10**9) %}x{% endfor %}", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd",
    "../../etc/passwd", "(a+)+$", "(((((a{1,99}){1,99}){1,99}){1,99}){1,99})", "root ::= root root | \"a\"",
    "start: start start", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}, _TREE,
    {"$ref": "#"}, {"$ref": "http://evil.example/schema.json"}, {"type": "json_schema", "json_schema": {"name": "x"}},
    {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x", "schema": _TREE}}, {"json": _TREE},
    {"regex": "(a|a)*b"}, {"choice": ["a"] * 5000}, {"grammar": "x" * 70000}, [TOOL] * 200, [TOOL], "required",
    {"type": "function", "function": {"name": "f"}}, [{"role": "user", "content": [{"type": "image_url", "image_url":
    {"url": "http://169.254.169.254/"}}]}], [{"role": "user", "content": [{"type": "input_audio"}]}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
                                           "function": {"name": "f", "arguments": "["}}]}],
    [{"role": "user", "content": "<|im_end|>" * 40}], HELLO * 300, "prefill-first", {"include_usage": True}, 99999999,
)  # fmt: skip


@cache
def known_fields(path: str) -> list[str]:
    """Every field that the endpoint at ``path`` takes."""
    models = {
        "/v1/completions": CompletionRequest,
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/embeddings": EmbeddingRequest,
        "/tokenize": TokenizeRequest,
    }
    model = models.get(path)
    return list(FIELDS) if model is None else sorted(model.model_fields)


def hostile(random: Random) -> bytes:
    """One request, of one of the kinds below."""
    kind = random.choice((_mutated,) * 5 + (_broken_json,) * 3 + (_sound,) * 2 + (_broken_http,) + (_odd_route,))
    return kind(random)


def http(
    method: str, path: str, body: bytes = b"", headers: tuple[tuple[str, str], ...] = (), *, length: int | None = None
) -> bytes:
    """A request as it goes over the wire; ``length`` lies about the body's."""
    given = {name.lower() for name, _ in headers}
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1"]
    if "content-type" not in given:
        lines.append("content-type: application/json")
    if "transfer-encoding" not in given:
        lines.append(f"content-length: {len(body) if length is None else length}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def _mutated(random: Random) -> bytes:
    """A sound request with one to three fields replaced or added."""
    path = random.choice(list(BASES))
    body = dict(BASES[path])
    for _ in range(random.randint(1, 3)):
        names = random.choice((FIELDS, tuple(body), tuple(known_fields(path)), tuple(known_fields(path))))
        body[random.choice(names)] = random.choice(VALUES)
    return http("POST", path, json.dumps(body).encode())


def _sound(random: Random) -> bytes:
    """Nothing is wrong with these: what goes on beside the others."""
    path = random.choice(("/v1/completions", "/v1/chat/completions"))
    logprobs: dict[str, Any] = {"logprobs": 2} if path == "/v1/completions" else {"logprobs": True, "top_logprobs": 2}
    extra = random.choice(
        ({}, logprobs, {"n": 3}, {"stream": True}, {"stop": "e"}, {"seed": 1}, {"ignore_eos": True})
    )
    return http("POST", path, json.dumps({**BASES[path], **extra, "max_tokens": random.randint(1, 12)}).encode())


def _broken_json(random: Random) -> bytes:
    path = random.choice(list(BASES))
    text = json.dumps(BASES[path]).encode()
    return http("POST", path, random.choice(_BREAKS)(text, random))


def _flipped(text: bytes, random: Random) -> bytes:
    changed = bytearray(text)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


_BREAKS: tuple[Callable[[bytes, Random], bytes], ...] = (
    _flipped,
    lambda text, random: text[: random.randrange(len(text))],
    lambda text, random: text + b"}" * random.randint(1, 9),
    lambda text, random: b"[" * random.randint(65, 30_000),
    lambda text, random: b'{"a":' * random.randint(65, 30_000),
    lambda text, random: text[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}",
    lambda text, random: text[:-1] + b',"seed":NaN}',
    lambda text, random: text[:-1] + b',"temperature":-Infinity}',
    lambda text, random: text[:-1] + b',"temperature":1e999}',
    lambda text, random: text[:-1] + b',"seed":' + b"9" * random.choice((41, 4301, 100_000)) + b"}",
    lambda text, random: text[:-1] + b',"user":"\\ud800"}',
    lambda text, random: text[:-1] + b',"user":"\xff\xfe"}',
    lambda text, random: text[:-1] + b',"user":"a","user":"b"}',
    lambda text, random: b"\xef\xbb\xbf" + text,
    lambda text, random: text.decode().encode(random.choice(("utf-16", "utf-32"))),
    lambda text, random: random.randbytes(random.randint(0, 200)),
    lambda text, random: b"",
    lambda text, random: b"null",
    lambda text, random: b'"' + b"x" * 5000,
    lambda text, random: b"[" + text + b"]",
)


def _odd_route(random: Random) -> bytes:
    """Other methods, other paths, other headers."""
    method = random.choice(("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "POST", "FOO"))
    path = random.choice(
        (*BASES, "/", "//", "/v1", "/docs", "/v1/models/" + "x" * 3000, "/%00", "/..%2f..%2fetc/passwd",
         "/v1/models/%ff", "/health?x=" + "y" * 3000, "/metrics", "/openapi.json",
         "/v1/responses/" + "r" * 200, "/v1/chat/completions/")
    )  # fmt: skip
    name, value = random.choice(
        (("authorization", "Bearer " + "k" * 2000), ("authorization", "Basic \xff"), ("x-request-id", "../" * 40),
         ("content-type", "text/plain"), ("content-type", "multipart/form-data; boundary=x"), ("origin", "null"),
         ("content-encoding", "gzip"), ("accept", "\x7f"), ("cookie", "a=" + "b" * 3000), ("expect", "100-continue"),
         ("x-api-key", "\x80\xff"), ("x-forwarded-for", "127.0.0.1"), ("upgrade", "websocket"))
    )  # fmt: skip
    text = json.dumps(BASES.get(path, {})).encode()
    return http(method, path, b"" if method in ("GET", "HEAD") else text, ((name, value),))


def _broken_http(random: Random) -> bytes:
    """What is hardly HTTP: the connection may simply be closed."""
    text = json.dumps(BASES["/v1/completions"]).encode()
    whole = http("POST", "/v1/completions", text)
    return random.choice(
        (
            lambda: random.randbytes(random.randint(1, 300)),
            lambda: _flipped(whole, random),
            lambda: whole[: random.randrange(1, len(whole))],
            lambda: http("POST", "/v1/completions", text, length=random.choice((0, 1, 10**6, 10**30))),
            lambda: http("POST", "/v1/completions", b"zz\r\n" + text, (("transfer-encoding", "chunked"),)),
            lambda: http("POST", "/v1/completions", b"ffffffffffffffff\r\n", (("transfer-encoding", "chunked"),)),
            lambda: http("GET", "/health", b"", (("x", "y" * 100_000),)),
            lambda: b"GET /health HTTP/9.9\r\n\r\n",
            lambda: whole * 20,
            lambda: whole.replace(b"\r\n", b"\n"),
            lambda: http("POST", "/v1/completions", text, (("content-length", "3"),)),
        )
    )()


def is_http(request: bytes) -> bool:
    """Whether ``request`` is well-formed enough that an answer is owed: every kind but ``_broken_http``."""
    head, _, body = request.partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return len(lengths) == 1 and lengths[0].split(b":")[1].strip() == str(len(body)).encode()
