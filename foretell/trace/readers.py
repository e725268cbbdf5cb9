"""Recorded traffic: the trace formats of Azure, Mooncake and ShareGPT. Every error names file, line and field."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from foretell.errors import ConfigError
from foretell.trace.errors import TraceFormatError
from foretell.trace.workloads import TraceRequest, Workload

FORMATS = ("azure", "mooncake", "sharegpt")
Encode = Callable[[str], list[int]]
CHARACTERS_PER_TOKEN = 4  # of English text, when no tokenizer is at hand
MAX_LENGTH = 2**31
MAX_HASH = 2**62
MAX_MILLISECONDS = 1e15  # 30,000 years


def read_trace(
    path: str | os.PathLike[str],
    format: str = "auto",
    *,
    max_requests: int | None = None,
    encode: Encode | None = None,
    block_tokens: int = 512,
) -> Workload:
    """The requests of a trace file, sorted by arrival, the first at 0 s.

    azure: csv with TIMESTAMP, ContextTokens, GeneratedTokens. mooncake: JSON lines with timestamp (ms),
    input_length, output_length and hash_ids, one for each ``block_tokens`` tokens. sharegpt: a JSON list of
    conversations, of which the first question and answer count; ``encode`` gives their tokens, else lengths
    are estimated at 4 characters per token. It has no times: all arrive at 0. Lengths of 0 become 1, as no
    engine serves less. Raises TraceFormatError.
    """
    file = Path(path)
    try:
        name = sniff(file) if format == "auto" else format
        if name not in FORMATS:
            raise ConfigError(f"unknown trace format {format!r}: choose auto, {', '.join(FORMATS)}")
        if name == "azure":
            found = _azure(file)
        elif name == "mooncake":
            found = _mooncake(file, block_tokens)
        else:
            found = _sharegpt(file, encode)
        requests = list(islice(found, max_requests))
    except OSError as error:
        raise TraceFormatError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TraceFormatError(f"{file}: not UTF-8 text (byte {error.start})") from None
    if not requests:
        raise TraceFormatError(f"{file}: the trace holds no request")
    requests.sort(key=lambda request: request.arrival_seconds)
    start = requests[0].arrival_seconds
    shifted = (replace(r, arrival_seconds=r.arrival_seconds - start) for r in requests)
    return Workload(file.name, f"{len(requests)} requests of {file.name} ({name})", tuple(shifted))


def sniff(file: Path) -> str:
    """The format, by the first character: a list is ShareGPT, an object Mooncake, anything else csv."""
    with file.open(encoding="utf-8-sig") as stream:
        first = stream.read(4096).lstrip()[:1]
    return {"[": "sharegpt", "{": "mooncake"}.get(first, "azure")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a file a value stands, for messages."""

    file: Path
    line: int
    unit: str = "line"

    def error(self, problem: str) -> TraceFormatError:
        return TraceFormatError(f"{self.file}: {self.unit} {self.line}: {problem}")

    def length(self, value: object, field: str) -> int:
        """A whole number of tokens ≥ 0; 0 becomes 1."""
        text = value.strip() if isinstance(value, str) else None
        if text is not None and text.isascii() and text.isdecimal() and len(text) < 12:
            value = int(text)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_LENGTH:
            raise self.error(f"{field} must be a whole number of tokens ≥ 0, got {_short(value)}")
        return max(1, value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# -- Azure ------------------------------------------------------------------------------------------------

AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def _azure(file: Path) -> Iterator[TraceRequest]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream)
        header = [name.strip() for name in next(rows, [])]
        missing = [name for name in AZURE_FIELDS if name not in header]
        if missing:
            raise TraceFormatError(f"{file}: line 1: the header lacks {', '.join(missing)}")
        columns = [header.index(name) for name in AZURE_FIELDS]
        try:
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield _azure_request(row, columns, _Place(file, rows.line_num))
        except csv.Error as error:
            raise TraceFormatError(f"{file}: line {rows.line_num}: {error}") from None


def _azure_request(row: list[str], columns: list[int], place: _Place) -> TraceRequest:
    for name, column in zip(AZURE_FIELDS, columns, strict=True):
        if column >= len(row) or not row[column].strip():
            raise place.error(f"{name} is missing")
    stamp, prompt, output = (row[column] for column in columns)
    try:
        when = datetime.fromisoformat(stamp.strip())
    except ValueError:
        raise place.error(f"TIMESTAMP {_short(stamp)} is no date and time") from None
    arrival = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    return TraceRequest(
        place.length(prompt, "ContextTokens"), place.length(output, "GeneratedTokens"), arrival_seconds=arrival
    )


# -- Mooncake ---------------------------------------------------------------------------------------------


def _mooncake(file: Path, block_tokens: int) -> Iterator[TraceRequest]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _mooncake_request(line, block_tokens, _Place(file, number))


def _mooncake_request(line: str, block_tokens: int, place: _Place) -> TraceRequest:
    entry = _parsed(line, place)
    if not isinstance(entry, dict):
        raise place.error("a request must be a JSON object")
    for name in ("timestamp", "input_length", "output_length"):
        if name not in entry:
            raise place.error(f"{name} is missing")
    stamp, hashes = entry["timestamp"], entry.get("hash_ids", [])
    if not isinstance(stamp, (int, float)) or isinstance(stamp, bool) or not abs(stamp) < MAX_MILLISECONDS:
        raise place.error(f"timestamp must be a number of milliseconds, got {_short(stamp)}")
    if not isinstance(hashes, list) or not all(type(h) is int and 0 <= h < MAX_HASH for h in hashes):
        raise place.error("hash_ids must be a list of whole numbers ≥ 0")
    return TraceRequest(
        place.length(entry["input_length"], "input_length"),
        place.length(entry["output_length"], "output_length"),
        arrival_seconds=stamp / 1000,
        block_hashes=tuple(hashes),
        block_tokens=block_tokens,
    )


def _parsed(text: str, place: _Place) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError covers absurdly long integers as well
        why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise place.error(f"not JSON: {why}") from None


# -- ShareGPT ---------------------------------------------------------------------------------------------


def _sharegpt(file: Path, encode: Encode | None) -> Iterator[TraceRequest]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceFormatError(f"{file}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise TraceFormatError(f"{file}: not JSON: {error}") from None
    if not isinstance(entries, list):
        raise TraceFormatError(f"{file}: a ShareGPT file is a list of conversations")
    for number, entry in enumerate(entries, 1):
        place = _Place(file, number, "entry")
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise place.error("conversations is missing or no list")
        if len(turns) < 2:
            continue  # a question nobody answered says nothing about output lengths
        yield _sharegpt_request(_value(turns, 0, place), _value(turns, 1, place), encode)


def _value(turns: list[Any], index: int, place: _Place) -> str:
    turn = turns[index]
    value = turn.get("value") if isinstance(turn, dict) else None
    if not isinstance(value, str):
        raise place.error(f"conversations[{index}].value is missing or no text")
    return value


def _sharegpt_request(question: str, answer: str, encode: Encode | None) -> TraceRequest:
    if encode is None:
        prompt_len, output_len = (max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN)) for text in (question, answer))
        return TraceRequest(prompt_len, output_len, prompt_text=question)
    ids = encode(question)
    if not ids:
        return TraceRequest(1, max(1, len(encode(answer))))
    return TraceRequest(len(ids), max(1, len(encode(answer))), prompt_token_ids=ids, prompt_text=question)
