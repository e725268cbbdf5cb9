"""What runs on a host for one instance: an engine, ranks, or both, as children that end with their slot.

A slot is a Ray actor within its placement group; nothing here knows of Ray. Children get where to dial in their
environment, which their own user alone can read.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from foretell.children import child_environment, python_module
from foretell.cluster.door import dial, listen_on

DIAL_VARIABLE, RANKS_VARIABLE = "FORETELL_DIAL", "FORETELL_RANKS"


class Slot:
    """One host's part of one instance."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.children: list[subprocess.Popen[bytes]] = []

    def facts(self) -> dict[str, Any]:
        """What must be equal on all hosts, and the memory that is free here, in bytes."""
        import foretell
        from foretell.memory import available_memory_bytes

        return {
            "foretell": foretell.__version__,
            "python": ".".join(platform.python_version_tuple()[:2]),
            "free_bytes": available_memory_bytes(),
        }

    def start_engine(self, dialling: dict[str, Any], ranks: dict[str, Any] | None) -> tuple[int, int]:
        """An engine that dials in; (its process id, the port where it waits for ``ranks``, if it has some)."""
        if ranks is None:
            return self._spawn(["foretell.server.engine_process", "dial"], dialling), 0
        with listen_on(self.address) as listener:
            given = {RANKS_VARIABLE: json.dumps({**ranks, "fd": listener.fileno(), "address": self.address})}
            command = ["foretell.server.engine_process", "dial"]
            return self._spawn(command, dialling, [listener.fileno()], given), listener.getsockname()[1]

    def start_rank(self, dialling: dict[str, Any]) -> int:
        return self._spawn(["foretell.parallel.rank", "tied", "dial"], dialling)

    def _spawn(
        self,
        command: Sequence[str],
        dialling: dict[str, Any],
        fds: Sequence[int] = (),
        more: dict[str, str] | None = None,
    ) -> int:
        environment = {**child_environment(), DIAL_VARIABLE: json.dumps(dialling), **(more or {})}
        interface = interface_of(self.address)
        if interface:
            environment |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        module, *arguments = command
        process = subprocess.Popen(
            [*python_module(module), *arguments], pass_fds=fds, stdin=subprocess.DEVNULL, env=environment
        )
        self.children.append(process)
        return process.pid


def dial_from_environment() -> socket.socket:
    """The connection that a slot's child was started for."""
    where = json.loads(os.environ.pop(DIAL_VARIABLE))
    return dial(where["address"], where["port"], where["name"], bytes.fromhex(where["secret"]))


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None if none has, or the system does not say."""
    with suppress(ImportError, OSError):
        import fcntl

        request_address = 0x8915  # SIOCGIFADDR
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _, name in socket.if_nameindex():
                with suppress(OSError):
                    answer = fcntl.ioctl(sock.fileno(), request_address, name.encode().ljust(256, b"\0"))
                    if socket.inet_ntoa(answer[20:24]) == address:
                        return name
    return None
