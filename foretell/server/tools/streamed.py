"""Calls of an answer that is constrained to them: certain to be calls, so their arguments are told as they come."""

from __future__ import annotations

import json
import re
from typing import Final

from foretell.server.tools.bodies import ValueBody
from foretell.server.tools.calls import ToolCallDelta, new_call_id

# after the end of the call before, if there is one
_HEAD: Final = re.compile(r'[\s\[\]},]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\{)')


class ConstrainedParser:
    """A ToolParser for answers of the form that ``tool_choice_schema`` gives. An answer that is cut short, by
    its length, say, leaves a call whose arguments end there; what comes before the first call's name is text then."""

    def __init__(self) -> None:
        self._held = ""  # not yet told
        self._arguments: ValueBody | None = None
        self._count = 0

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        self._held += text
        calls: list[ToolCallDelta] = []
        while self._held and self._step(calls):
            pass
        return "", calls

    def parts(self, text: str) -> list[tuple[str, list[ToolCallDelta]]]:
        return [self.push(text)]

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        held, self._held = self._held, ""
        return ("" if self._count else held), []

    def _step(self, calls: list[ToolCallDelta]) -> bool:
        """Deal with a part of what is held; False: more text is needed."""
        if self._arguments is None:
            head = _HEAD.match(self._held)
            if head is None:
                return False
            calls.append(ToolCallDelta(self._count, new_call_id(), json.loads(head[1])))
            self._count += 1
            self._held = self._held[head.end() :]
            self._arguments = ValueBody("{")
            return True
        used = self._arguments.feed(self._held)
        piece = self._held if used is None else self._held[:used]
        calls.append(ToolCallDelta(self._count - 1, arguments=piece))
        self._held = self._held[len(piece) :]
        if used is not None:
            self._arguments = None
        return used is not None
