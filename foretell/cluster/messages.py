"""What the server and its placer tell each other: lines of JSON of known types, over a socket pair."""

from __future__ import annotations

from typing import Any

import msgspec

from foretell.cluster.place import Span

MAX_LINE_BYTES = 1 << 20


class ListHosts(msgspec.Struct, tag=True):
    """Answered with a list of ``Host``."""

    call: int


class StartInstance(msgspec.Struct, tag=True):
    """Reserve these places and start an engine that dials in at ``address``; answered with ``Started``.

    Secrets are hexadecimal: one for the engine's way to the server, one for the ranks' to the engine."""

    call: int
    name: str
    spans: list[Span]
    cpus_per_rank: int
    gpus: bool
    address: str
    port: int
    secret: str
    rank_secret: str


class EndInstance(msgspec.Struct, tag=True):
    """Give its places back; what runs there ends. Not answered."""

    name: str


class Started(msgspec.Struct):
    """Where the engine runs, and how much memory each host had left, in bytes, by address."""

    pid: int
    free_bytes: dict[str, int]


class Reply(msgspec.Struct):
    """To the call of that number. ``error``: one line if it failed, ``user_error`` if it is for a user to mend."""

    call: int
    value: Any = None
    error: str | None = None
    user_error: bool = False


ToPlacer = ListHosts | StartInstance | EndInstance
