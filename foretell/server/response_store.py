"""The latest answers of ``/v1/responses``, in memory, so that a request can go on from one by its id."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Stored:
    """``body`` is the response object as JSON; ``messages`` the conversation up to and with its answer."""

    body: bytes
    messages: tuple[dict[str, Any], ...]
    num_bytes: int


class ResponseStore:
    """Bounded by number and bytes: the ones that were not asked for longest go first. Each belongs to the key it was
    made with; under another key it is not there."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self.max_responses = max_responses
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, owner: str, response: dict[str, Any], messages: Sequence[dict[str, Any]]) -> None:
        body = _encode(response)
        stored = Stored(body, tuple(messages), len(body) + len(_encode(messages)))
        if stored.num_bytes > self.max_bytes:
            return
        self._entries[owner, response["id"]] = stored
        self.num_bytes += stored.num_bytes
        while len(self._entries) > self.max_responses or self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, owner: str, response_id: str) -> Stored | None:
        stored = self._entries.get((owner, response_id))
        if stored is not None:
            self._entries.move_to_end((owner, response_id))
        return stored

    def delete(self, owner: str, response_id: str) -> bool:
        stored = self._entries.pop((owner, response_id), None)
        if stored is not None:
            self.num_bytes -= stored.num_bytes
        return stored is not None


def owner_of(keys: Iterable[str]) -> str:
    """A name for whoever presented these keys; no key can be read out of it."""
    return hashlib.sha256("\n".join(sorted(set(keys))).encode("utf-8", "surrogatepass")).hexdigest()
