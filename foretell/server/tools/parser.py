"""The text of an answer, as it comes → text to show and tool calls.

A call is told when it is complete and has been understood; until then its text is held back. What turns out to be no
call comes out as the text it is: nothing is ever lost, and no half of a marker is ever shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Protocol

from foretell.server.tools.bodies import Body
from foretell.server.tools.calls import Call, ToolCallDelta, new_call_id

_WHITE: Final = " \t\r\n"


class ToolParser(Protocol):
    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        """Text that is safe to show, and pieces of calls, in the order of their indices."""
        ...

    def parts(self, text: str) -> list[tuple[str, list[ToolCallDelta]]]:
        """The same in the order in which the model wrote it: some text, then calls, and so on."""
        ...

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """The rest, when the answer has ended; after it the parser is spent."""
        ...


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a family of models writes calls. ``starts``: markers that a body follows. ``bare``: characters that open a
    body without any marker, at the beginning of an answer or after another call. ``between``: what may stand
    between calls, and is no text."""

    name: str
    starts: tuple[str, ...]
    body: Callable[[], Body]
    read: Callable[[str], list[Call] | None]
    bare: str = ""
    between: str = ""


class FormatParser:
    """A ToolParser for one format. ``names``: calls of other names are text; None: any name is taken."""

    def __init__(self, form: ToolFormat, names: Collection[str] | None = None) -> None:
        self._format = form
        self._names = None if names is None else frozenset(names)
        self._held = ""  # not yet shown: white space, and what may become a marker; or a call so far
        self._body: Body | None = None
        self._marked = 0  # of ``_held``: up to the end of the marker
        self._fed = 0  # of ``_held``, as far as the body has seen it
        self._at_start = True  # nothing but calls and white space so far
        self._after_call = False
        self._count = 0

    def push(self, text: str) -> tuple[str, list[ToolCallDelta]]:
        parts = self.parts(text)
        return "".join(shown for shown, _ in parts), [call for _, calls in parts for call in calls]

    def parts(self, text: str) -> list[tuple[str, list[ToolCallDelta]]]:
        self._held += text
        parts: list[tuple[str, list[ToolCallDelta]]] = []
        shown: list[str] = []
        calls: list[ToolCallDelta] = []
        while self._step(shown, calls):
            if calls:
                parts.append(("".join(shown), calls))
                shown, calls = [], []
        return [*parts, ("".join(shown), calls)] if shown or calls else parts

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        if self._body is None:
            rest, self._held = self._held, ""
            return ("" if self._after_call and self._is_between(rest) else rest), []
        found = self._understood(self._body.read())  # some models leave out the end marker
        held, self._held = self._held, ""
        return (held, []) if found is None else ("", self._told(found))

    def _step(self, shown: list[str], calls: list[ToolCallDelta]) -> bool:
        """Deal with a part of what is held; False: more text is needed."""
        return self._in_text(shown) if self._body is None else self._in_body(self._body, shown, calls)

    # -- outside of calls ---------------------------------------------------------------------------

    def _in_text(self, shown: list[str]) -> bool:
        held = self._held
        start, length = self._find_start(held)
        if start < 0:
            keep = self._undecided(held)
            self._show(held[: len(held) - keep], shown)
            self._held = held[len(held) - keep :]
            return False
        lead = len(held[:start].rstrip(_WHITE))
        if not self._is_between(held[:start]):
            self._show(held[:lead], shown)
            start -= lead
            self._held = held[lead:]
        self._body = self._format.body()
        self._fed = self._marked = start + length
        return True

    def _find_start(self, held: str) -> tuple[int, int]:
        """(position, length of the marker) of the first beginning of a call; -1 if there is none yet."""
        found = [(at, -len(marker)) for marker in self._format.starts if (at := held.find(marker)) >= 0]
        if self._at_start and self._format.bare:
            body = held.lstrip(_WHITE + (self._format.between if self._after_call else ""))
            if body and body[0] in self._format.bare:
                found.append((len(held) - len(body), 0))
        at, length = min(found, default=(-1, 0))
        return at, -length

    def _undecided(self, held: str) -> int:
        """Characters at the end that may yet become a marker, or white space in front of one."""
        longest = 0
        for marker in self._format.starts:
            for length in range(min(len(marker) - 1, len(held)), longest, -1):
                if marker.startswith(held[len(held) - length :]):
                    longest = length
                    break
        text = held[: len(held) - longest]
        if self._after_call and self._is_between(text):
            return len(held)
        return longest + len(text) - len(text.rstrip(_WHITE))

    def _is_between(self, text: str) -> bool:
        return not text.strip(_WHITE + (self._format.between if self._after_call else ""))

    def _show(self, text: str, shown: list[str]) -> None:
        if text:
            shown.append(text)
            self._at_start = self._at_start and not text.strip(_WHITE)
            self._after_call = False

    # -- inside of one ------------------------------------------------------------------------------

    def _in_body(self, body: Body, shown: list[str], calls: list[ToolCallDelta]) -> bool:
        fresh = self._held[self._fed :]
        used = body.feed(fresh)
        if used is None:
            self._fed = len(self._held)
            return False
        found = None if used < 0 else self._understood(body.read())
        self._body = None
        if found is not None:
            calls += self._told(found)
            self._held = fresh[used:]
            return True
        whole = self._fed + used if used >= 0 else self._marked
        self._at_start = False
        self._show(self._held[:whole], shown)
        self._held = self._held[whole:]
        return True

    def _understood(self, body: str) -> list[Call] | None:
        found = self._format.read(body)
        if found is None or self._names is None or all(call.name in self._names for call in found):
            return found
        return None

    def _told(self, found: list[Call]) -> list[ToolCallDelta]:
        first, self._count = self._count, self._count + len(found)
        self._after_call = True
        return [ToolCallDelta(first + i, new_call_id(), c.name, c.arguments) for i, c in enumerate(found)]
