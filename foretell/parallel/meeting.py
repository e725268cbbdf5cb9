"""How a driver gets its ranks: started here as children, or come from a cluster's hosts, where slots start them."""

from __future__ import annotations

import json
import os
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from foretell.children import python_module, start_child
from foretell.errors import UnavailableError

MEET_SECONDS = 120.0


class RankProcess(Protocol):
    """What the driver does with a rank's process."""

    pid: int

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int | None: ...


def start_here() -> tuple[RankProcess, socket.socket]:
    """A rank as a child of this process, and our end of the way to it."""
    # Linux takes the death of the thread that starts a process for the parent's: only the main thread stays
    tied = threading.current_thread() is threading.main_thread()
    return start_child([*python_module("foretell.parallel.rank"), "tied" if tied else "free"])


@dataclass(slots=True)
class DistantProcess:
    """A rank on some host. It ends when its connection does, and with its slot."""

    sock: socket.socket
    pid: int = 0

    def poll(self) -> int | None:
        return None  # nobody here can know

    def kill(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout: float | None = None) -> int | None:
        return None


@dataclass(slots=True)
class Meeting:
    """Where the ranks of other hosts dial in. ``hosts``: by rank. ``memory_bytes``: free on all of them together."""

    address: str
    hosts: list[str]
    memory_bytes: int
    secret: bytes
    listener: socket.socket
    _coming: dict[int, Future[socket.socket]] = field(default_factory=dict)
    _door: Any = None
    _store: Any = None

    @staticmethod
    def from_environment() -> Meeting | None:
        """As the slot that started this process says; None if no slot did."""
        text = os.environ.pop("FORETELL_RANKS", None)
        if text is None:
            return None
        said = json.loads(text)
        listener = socket.socket(fileno=said["fd"])
        secret = bytes.fromhex(said["secret"])
        return Meeting(said["address"], said["hosts"], said["memory_bytes"], secret, listener)

    def open_store(self) -> str:
        """The URL of a store where the ranks find each other; they may come in from now on."""
        from torch._C._distributed_c10d import TCPStore

        from foretell.cluster.door import Door, listen_on

        listener = listen_on(self.address)
        port = listener.getsockname()[1]
        self._store = TCPStore(
            self.address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._door = Door(self.address, self.listener)
        for rank in range(len(self.hosts)):
            self._coming[rank] = self._door.expect(f"rank {rank}", self.secret)
        return f"tcp://{self.address}:{port}"

    def wait_for(self, rank: int, name: str) -> tuple[DistantProcess, socket.socket]:
        """The connection of that rank; UnavailableError if it has not come in time."""
        try:
            sock = self._coming[rank].result(MEET_SECONDS)
        except TimeoutError:
            raise UnavailableError(
                f"{name} of host {self.hosts[rank]} has not reached {self.address} within {MEET_SECONDS:.0f} s: "
                "hosts must reach each other on all ports; if they do, Ray's logs there say more"
            ) from None
        return DistantProcess(sock), sock

    def close(self) -> None:
        if self._door is not None:
            self._door.close()
        self._store = None
