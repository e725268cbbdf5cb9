"""What an administrator may ask of a running engine, between two steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from foretell.errors import InvalidRequestError

if TYPE_CHECKING:
    from foretell.core.engine import Engine

MAX_STEP_RECORDS = 4096


class Commands:
    """Of one engine; belongs to the thread that the engine belongs to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._records: deque[dict[str, Any]] | None = None
        self._logged = engine.on_step

    def run(self, command: str, arguments: dict[str, Any]) -> Any:
        """ForetellError for a command that does not exist, or cannot be carried out."""
        commands: dict[str, Callable[..., Any]] = {
            "set_policy": self._set_policy,
            "stats": self._engine.stats,
            "steps": self._steps,
        }
        run = commands.get(command)
        if run is None:
            raise InvalidRequestError(f"the engine has no command {command!r}: use set_policy, stats or steps")
        try:
            return run(**arguments)
        except TypeError as error:
            raise InvalidRequestError(f"{command}: {error}") from None

    def _set_policy(self, name: str) -> dict[str, Any]:
        self._engine.set_policy(name)
        return {"policy": name}

    def _steps(self, keep: int | None = None) -> list[dict[str, Any]]:
        """The records of the steps since the last call, the newest ``keep``; the first call begins to keep them,
        ``keep=0`` ends it."""
        if keep is not None and not 0 <= keep <= MAX_STEP_RECORDS:
            raise InvalidRequestError(f"keep must be between 0 and {MAX_STEP_RECORDS}, got {keep!r}")
        kept = list(self._records or ())
        if keep == 0:
            self._records, self._engine.on_step = None, self._logged
        else:
            size = keep or (self._records.maxlen if self._records is not None else 256)
            self._records, self._engine.on_step = deque(maxlen=size), self._record
        return kept

    def _record(self, record: dict[str, Any]) -> None:
        if self._records is not None:
            self._records.append(record)
        if self._logged is not None:
            self._logged(record)
