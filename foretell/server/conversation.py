"""Items and blocks of other interfaces → chat messages, as models' templates know them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from foretell.errors import InvalidRequestError

Message = dict[str, Any]


class Conversation:
    """Chat messages, one after another. What an assistant thinks, says and then calls is one message of its."""

    def __init__(self, messages: Iterable[Message] = ()) -> None:
        self.messages: list[Message] = list(messages)
        self._turn: Message | None = None  # the assistant's message that may still grow
        self._names = {
            call["id"]: call["function"]["name"] for m in self.messages for call in m.get("tool_calls", ())
        }

    def say(self, role: str, text: str) -> None:
        """A message of anybody but the assistant."""
        self.messages.append({"role": role, "content": text})
        self._turn = None

    def think(self, text: str) -> None:
        """Reasoning that goes before what the assistant says or calls next."""
        self._turn = {"role": "assistant", "content": "", "reasoning_content": text}
        self.messages.append(self._turn)

    def answer(self, text: str) -> None:
        """Words of the assistant. A second message of its stays a second message."""
        if self._turn is None or self._turn["content"] or "tool_calls" in self._turn:
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        self._turn["content"] = text

    def call(self, id: str, name: str, arguments: dict[str, Any]) -> None:
        """A tool call of the assistant."""
        if self._turn is None:
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        function = {"name": name, "arguments": arguments}
        self._turn.setdefault("tool_calls", []).append({"id": id, "type": "function", "function": function})
        self._names[id] = name

    def result(self, id: str, text: str) -> None:
        """What a tool gave back. InvalidRequestError if nothing called it."""
        if id not in self._names:
            raise InvalidRequestError(f"there is a result for the tool call {id[:64]!r}, but no such call before it")
        self.messages.append({"role": "tool", "content": text, "tool_call_id": id, "name": self._names[id]})
        self._turn = None


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where a conversation may begin once older turns are left out: at each user message but its first turn's."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    return [i for i, message in enumerate(messages) if i > first and message["role"] == "user"]


def since(messages: Sequence[Message], start: int) -> list[Message]:
    """The conversation from ``start`` on, and every system message."""
    return [message for i, message in enumerate(messages) if i >= start or message["role"] == "system"]


def parsed_arguments(arguments: str, id: str) -> dict[str, Any]:
    """A call's arguments as its sender wrote them, JSON text of an object; InvalidRequestError if they are none."""
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequestError(f"the arguments of the tool call {id[:64]!r} are no JSON object")
    return parsed


def read_arguments(arguments: str) -> dict[str, Any]:
    """A call's arguments as a model wrote them. Cut at the answer's length they are incomplete: then what can be
    read, as the clients do it with a stream."""
    from pydantic_core import from_json

    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:  # nothing at all, or no JSON
        return {}
    return value if isinstance(value, dict) else {}
