"""Step records in a file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from foretell.errors import ConfigError


class StepLog:
    """One JSON line per step, appended to a file as the steps happen. A log that cannot be written any more is
    given up with one warning: the requests matter more."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            # open for as long as the engine lives
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f"the step log {os.fspath(path)} cannot be written: {error.strerror}") from error

    def __call__(self, record: dict[str, Any]) -> None:
        try:
            if not self._file.closed:
                self._file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"warning: the step log ends here: {error.strerror}", file=sys.stderr)
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
