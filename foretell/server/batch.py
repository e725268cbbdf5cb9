"""`foretell run-batch`: OpenAI batch files through the server's own routes, without a socket.

Answers stand in the order of their questions. That makes the output its own checkpoint: what it holds is done, and
a second run goes on behind it.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx
import msgspec

from foretell.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from fastapi import FastAPI

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
WINDOW = 4  # lines read ahead for each one under way: a slow answer holds back those behind it, not the engine
WINDOW_BYTES = 64 << 20
Advance = Callable[[int], None]


class LineError(Exception):
    """A line that is no request; ``code`` is for programs."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Line:
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True)
class Tally:
    """What came of a batch. ``errors`` counts lines by code or HTTP status."""

    skipped: int = 0  # found done
    done: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)


# -- files ------------------------------------------------------------------------------------------------


def lines_of(stream: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """Lines that are not blank, without their ends. Of one that is too long comes only its first part, which
    is longer than ``max_bytes``; memory stays bounded whatever the file holds."""
    while part := stream.readline(max_bytes + 2):
        if len(part) > max_bytes and not part.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
        line = part.strip()
        if line:
            yield line


def parse_line(raw: bytes, max_bytes: int) -> Line:
    """LineError for what is no request of a batch."""
    if len(raw) > max_bytes:
        raise LineError("line_too_long", f"the line is longer than {max_bytes} bytes")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8, or nested too deeply"
        raise LineError("invalid_json", f"the line is no valid JSON: {why}") from None
    if not isinstance(value, dict):
        raise LineError("invalid_line", "a request must be a JSON object")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        raise LineError("invalid_line", "custom_id is missing or no text")
    if not custom_id.isprintable():  # lone surrogates among others, which could not be written back
        raise LineError("invalid_line", "custom_id holds characters that cannot be printed")
    method, url, body = value.get("method", "POST"), value.get("url"), value.get("body")
    if method != "POST":
        raise LineError("invalid_method", "method must be POST", custom_id)
    if url not in URLS:
        raise LineError("invalid_url", f"url must be one of {', '.join(URLS)}", custom_id)
    if not isinstance(body, dict):
        raise LineError("invalid_line", "body is missing or no JSON object", custom_id)
    if body.get("stream"):
        raise LineError("invalid_line", "a batch has no streams: leave stream out of the body", custom_id)
    return Line(custom_id, url, body)


def resume(source: Path, target: Path, max_bytes: int) -> int:
    """How many lines of ``source`` are answered in ``target``, of which a torn last line is cut off.

    ConfigError if the answers are not those of this input.
    """
    if not target.exists():
        return 0
    done = end = 0
    with target.open("rb") as answers, source.open("rb") as questions:
        asked = lines_of(questions, max_bytes)
        for answer in answers:
            if not answer.endswith(b"\n"):
                break
            try:
                answered = msgspec.json.decode(answer)["custom_id"]
            except (msgspec.DecodeError, LookupError, TypeError):
                answered = LineError
            question = next(asked, None)
            if question is None or _custom_id(question, max_bytes) != answered:
                raise ConfigError(
                    f"{target}: line {done + 1} does not answer line {done + 1} of {source}: "
                    "name another output file, or start over with --overwrite"
                )
            done, end = done + 1, end + len(answer)
    if end < target.stat().st_size:
        with target.open("r+b") as answers:
            answers.truncate(end)
    return done


def _custom_id(raw: bytes, max_bytes: int) -> str | None:
    try:
        return parse_line(raw, max_bytes).custom_id
    except LineError as error:
        return error.custom_id


# -- the run ----------------------------------------------------------------------------------------------


async def run_batch(
    app: FastAPI,
    source: Path,
    target: Path,
    *,
    concurrency: int,
    max_bytes: int,
    overwrite: bool = False,
    advance: Advance = lambda tokens: None,
    on_resume: Callable[[int], None] = lambda lines: None,
    tally: Tally | None = None,
) -> Tally:
    """Answer every line of ``source`` in ``target``. Memory holds ``concurrency`` × WINDOW lines, and little more
    than WINDOW_BYTES of them.

    UnavailableError when the engine is lost; what was answered stays, and so it does when this is cancelled.
    """
    tally = Tally() if tally is None else tally
    tally.skipped = 0 if overwrite else resume(source, target, max_bytes)
    on_resume(tally.skipped)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    room = asyncio.Semaphore(concurrency)
    pending: deque[tuple[asyncio.Task[dict[str, Any]], int]] = deque()
    held = 0  # bytes of the lines in it

    with source.open("rb") as questions, target.open("wb" if overwrite else "ab") as answers:

        async def write_next() -> None:
            nonlocal held
            task, size = pending[0]
            answer = await task
            pending.popleft()
            held -= size
            answers.write(msgspec.json.encode(answer) + b"\n")
            answers.flush()
            advance(_count(answer, tally))

        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=None) as client:
            try:
                for number, raw in enumerate(lines_of(questions, max_bytes)):
                    if number < tally.skipped:
                        continue
                    pending.append((asyncio.create_task(_answer(client, raw, max_bytes, room)), len(raw)))
                    held += len(raw)
                    full = len(pending) >= concurrency * WINDOW or held > WINDOW_BYTES
                    while pending and (full or pending[0][0].done()):
                        await write_next()
                        full = len(pending) >= concurrency * WINDOW or held > WINDOW_BYTES
                while pending:
                    await write_next()
            finally:
                for task, _ in pending:
                    task.cancel()
                await asyncio.gather(*(task for task, _ in pending), return_exceptions=True)
    return tally


async def _answer(client: httpx.AsyncClient, raw: bytes, max_bytes: int, room: asyncio.Semaphore) -> dict[str, Any]:
    """One line's answer in the batch shape."""
    answer: dict[str, Any] = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": None}
    try:
        line = parse_line(raw, max_bytes)
    except LineError as error:
        problem = {"code": error.code, "message": str(error)}
        return answer | {"custom_id": error.custom_id, "response": None, "error": problem}
    async with room:
        body = json.dumps(line.body).encode()  # plain ASCII: what JSON cannot hold is for the route to refuse
        response = await client.post(line.url, content=body, headers={"content-type": "application/json"})
    content = response.json()
    if response.status_code == 503:
        raise UnavailableError(f"the engine was lost at {line.custom_id!r}: {content['error']['message']}")
    told = {
        "status_code": response.status_code,
        "request_id": response.headers.get("x-request-id", ""),
        "body": content,
    }
    return answer | {"custom_id": line.custom_id, "response": told, "error": None}


def _count(answer: dict[str, Any], tally: Tally) -> int:
    """Into the tally; the output tokens."""
    tally.done += 1
    response = answer["response"]
    if response is None:
        tally.errors[answer["error"]["code"]] += 1
        return 0
    if response["status_code"] != 200:
        tally.errors[f"HTTP {response['status_code']}"] += 1
        return 0
    usage = response["body"].get("usage") or {}
    tally.prompt_tokens += usage.get("prompt_tokens") or usage.get("input_tokens") or 0
    tokens = usage.get("completion_tokens") or usage.get("output_tokens") or 0
    tally.output_tokens += tokens
    return int(tokens)
