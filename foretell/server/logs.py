"""The server's log on stderr: lines for people, or JSON lines. What users ask and get never stands in it."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from foretell.errors import ForetellError

if TYPE_CHECKING:
    from foretell.server.story import Story

LogFormat = Literal["human", "json"]
LEVELS = ("debug", "info", "warning", "error")
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})  # polled all day: told only when they fail
MAX_PATH_CHARS = 200
access = logging.getLogger("foretell.access")


def configure(format: LogFormat, level: str = "info", stream: Any = None) -> None:
    """Send our loggers and uvicorn's to one handler; nothing else of the process is touched."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines() if format == "json" else PlainLines())
    for name, least in (("foretell", level), ("uvicorn", "warning" if level == "info" else level)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(least.upper())
        logger.propagate = False


class JsonLines(logging.Formatter):
    """One object per line: time (UTC, RFC 3339), level, logger, message, and the fields that a record carries."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class PlainLines(logging.Formatter):
    """14:02:11.093 info  message. Control characters, which a client could have sent, are spelled out."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {printable(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _utc(seconds: float) -> str:
    milliseconds = int(seconds * 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(milliseconds // 1000)) + f".{milliseconds % 1000:03d}Z"


class AccessLog:
    """An observer that writes a line per request."""

    def ended(self, story: Story) -> None:
        quiet = story.path in QUIET_PATHS and story.status == 200
        level = logging.DEBUG if quiet else logging.WARNING if story.status >= 500 else logging.INFO
        if access.isEnabledFor(level):
            fields = access_fields(story)
            access.log(level, "%s", _sentence(story, fields), extra={"fields": fields})


def access_fields(story: Story) -> dict[str, Any]:
    """Facts only: no prompt, no answer, no header, no query, no key. Times in seconds."""
    fields: dict[str, Any] = {
        "request_id": story.request_id,
        "method": story.method,
        "path": story.path[:MAX_PATH_CHARS],
        "status": story.status,
        "seconds": round(story.seconds, 6),
        "complete": story.whole,
    }
    if story.generations:
        fields |= {
            "prompt_tokens": story.prompt_tokens,
            "cached_tokens": story.cached_tokens,
            "output_tokens": story.output_tokens,
            "finish_reasons": story.finish_reasons,
        }
    first = story.first
    if first is not None and first.first_token is not None:
        fields["ttft_seconds"] = round(first.first_token - story.started, 6)
        if first.first_scheduled is not None:
            fields["queue_seconds"] = round(first.first_scheduled - first.arrival, 6)
    errors = [g.error for g in story.generations if g.error is not None]
    if errors:
        # a message of ours is safe to show; any other may quote what it choked on
        fields["error"] = str(errors[0]) if isinstance(errors[0], ForetellError) else type(errors[0]).__name__
    return fields


def _sentence(story: Story, fields: dict[str, Any]) -> str:
    parts = [f"{story.method} {fields['path']} {story.status or 'client left'} in {story.seconds:.3f} s"]
    if story.generations:
        parts.append(f"{story.prompt_tokens} + {story.output_tokens} tokens")
    if "ttft_seconds" in fields:
        parts.append(f"TTFT {fields['ttft_seconds'] * 1e3:.0f} ms")
    if story.status and not story.whole:
        parts.append("cut short")
    if "error" in fields:
        parts.append(fields["error"])
    return ", ".join([*parts, story.request_id])
