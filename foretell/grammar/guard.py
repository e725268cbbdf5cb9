"""The parent's side of the checking process."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from foretell.children import python_module
from foretell.core.structured import StructuredOutput
from foretell.errors import ForetellError, InvalidRequestError

START_SECONDS: Final = 60.0
ANSWER_SECONDS: Final = 30.0  # by the clock; the kernel ends a check by its CPU time long before
MAX_ANSWER_BYTES: Final = 4 << 20


class GrammarGuard:
    """Compiles forms in a process of its own, started when first needed and again when it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._closed = False

    def check(self, form: StructuredOutput) -> tuple[str, int]:
        """(grammar text, bytes that compiling it took). Raises InvalidRequestError if it cannot be compiled, or not
        within the limits. Blocks; one at a time."""
        with self._lock:
            process = self._started()
            try:
                self._write(process, json.dumps({"kind": form.kind, "value": form.value}).encode() + b"\n")
                answer = self._read(process, ANSWER_SECONDS)
            except (EOFError, OSError, TimeoutError):
                self._end()
                if self._closed:
                    raise ForetellError("the engine was closed") from None
                raise InvalidRequestError(
                    f"the {form.kind} takes too much time or memory to compile: make it simpler"
                ) from None
        found: dict[str, Any] = json.loads(answer)
        if found["error"]:
            raise InvalidRequestError(f"the {form.kind} cannot be used: {found['error']}")
        return found["text"], found["bytes"]

    def close(self) -> None:
        """End the process, and with it a check in progress."""
        self._closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        if self._closed:
            raise ForetellError("the engine was closed")
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            python_module("foretell.grammar.checker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "RAYON_NUM_THREADS": "1"},
        )
        try:
            self._read(self._process, START_SECONDS)
        except (EOFError, OSError, TimeoutError):
            self._end()
            raise ForetellError(
                "the process that checks grammars cannot be started: structured output needs it, and memory for it"
            ) from None
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()

    @staticmethod
    def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.flush()

    @staticmethod
    def _read(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """One line; TimeoutError or EOFError if none comes."""
        assert process.stdout is not None
        until, data = time.monotonic() + seconds, bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part or len(data) > MAX_ANSWER_BYTES:
                    raise EOFError
                data += part
        return bytes(data)
