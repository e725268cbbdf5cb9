"""Where the body of a call ends. Each is fed text as it comes and looks at every character once."""

from __future__ import annotations

from typing import Final, Protocol

MAX_PREFIX_CHARS: Final = 256


class Body(Protocol):
    def feed(self, text: str) -> int | None:
        """Characters of ``text`` up to and including the body's end; None: it goes on after all of them; -1: this
        is no body, whatever comes."""
        ...

    def read(self) -> str:
        """The body so far, without its end marker."""
        ...


class EnclosedBody:
    """Up to an end marker that stands outside of any JSON string; or, where the body is ``<function=…>…</function>``,
    whose parameters are plain text with any quotes, right behind its end."""

    def __init__(self, end: str) -> None:
        self._end = end
        self._text = ""
        self._strings = _Strings('"')
        self._scanned = 0
        self._ended = False

    def feed(self, text: str) -> int | None:
        before = len(self._text)
        self._text += text
        start = max(self._scanned, before - len(self._end) + 1)
        while (at := self._text.find(self._end, start)) >= 0:
            self._strings.feed(self._text[self._scanned : at])
            self._scanned = at
            if self._may_end(at):
                self._text = self._text[:at]
                self._ended = True
                return at + len(self._end) - before
            start = at + 1
        return None

    def _may_end(self, at: int) -> bool:
        if self._text.lstrip().startswith("<function="):
            return self._text[max(0, at - 32) : at].rstrip().endswith("</function>")
        return not self._strings.inside

    def read(self) -> str:
        return self._text


class ValueBody:
    """One bracketed value, with nothing but white space before it, or a name where ``named``. Python's two kinds
    of quotes count where ``quotes`` says so."""

    def __init__(self, opening: str, *, quotes: str = '"', named: bool = False) -> None:
        self._opening = opening
        self._named = named
        self._strings = _Strings(quotes)
        self._parts: list[str] = []
        self._prefix = ""
        self._depth = 0

    def feed(self, text: str) -> int | None:
        for at, character in enumerate(text):
            if self._depth == 0:
                if not self._open(character):
                    return -1
                continue
            was_inside = self._strings.inside
            self._strings.feed(character)
            if was_inside or self._strings.inside:
                continue
            if character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if self._depth == 0:
                    self._parts.append(text[: at + 1])
                    return at + 1
        self._parts.append(text)
        return None

    def _open(self, character: str) -> bool:
        """Take in a character before the value; False: no value comes."""
        blank = not self._prefix.strip()
        if character in (self._opening if blank else "{"):
            self._depth = 1
            return True
        self._prefix += character
        if len(self._prefix) > MAX_PREFIX_CHARS:
            return False
        return character.isspace() or (self._named and character != "\n")

    def read(self) -> str:
        return "".join(self._parts)


class _Strings:
    """Whether a text, fed in pieces, stands within quotes."""

    def __init__(self, quotes: str) -> None:
        self._quotes = quotes
        self._open = ""
        self._escaped = False

    @property
    def inside(self) -> bool:
        return bool(self._open)

    def feed(self, text: str) -> None:
        for character in text:
            if not self._open:
                if character in self._quotes:
                    self._open = character
            elif self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._open:
                self._open = ""
