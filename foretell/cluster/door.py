"""Sockets between hosts: who dials in proves that it knows a secret, and is shown that the other side does too.

Both sides send a nonce and an HMAC-SHA256 over both nonces and the name; the secret itself never travels. What
follows is neither encrypted nor signed: a cluster's network must be its own.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from concurrent.futures import Future
from contextlib import suppress

from foretell.errors import ForetellError

MAGIC = b"foretell-1\n"
NONCE_BYTES = 32
SILENT_SECONDS = 5.0  # a link that carries nothing for so long, though something was sent, is cut
GREETING_SECONDS = 10.0
DIAL_SECONDS = 120.0  # the other side may be importing torch yet


class LinkError(ForetellError):
    """A connection between two hosts could not be made."""


def proof(secret: bytes, side: bytes, first: bytes, second: bytes, name: bytes) -> bytes:
    return hmac.digest(secret, b"|".join((side, first, second, name)), "sha256")


class Door:
    """Listens on one address for those that are expected; everybody else is sent away without a word."""

    def __init__(self, address: str, listener: socket.socket | None = None) -> None:
        self._listener = listener or listen_on(address)
        self.address, self.port = self._listener.getsockname()[:2]
        self._expected: dict[bytes, tuple[bytes, Future[socket.socket]]] = {}
        self._lock = threading.Lock()
        self._greeting = threading.Semaphore(64)
        threading.Thread(target=self._open, name="foretell-door", daemon=True).start()

    def expect(self, name: str, secret: bytes) -> Future[socket.socket]:
        """The connection, once somebody comes who calls itself so and knows the secret."""
        coming: Future[socket.socket] = Future()
        with self._lock:
            self._expected[name.encode()] = (secret, coming)
        return coming

    def forget(self, name: str) -> None:
        with self._lock:
            self._expected.pop(name.encode(), None)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    def _open(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._greeting.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(sock,), name="foretell-greeting", daemon=True).start()
            else:
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(GREETING_SECONDS)
            coming = self._examine(sock)
            sock.settimeout(None)
            if coming is None or not coming.set_running_or_notify_cancel():
                sock.close()
            else:
                coming.set_result(sock)
        except OSError:
            sock.close()
        finally:
            self._greeting.release()

    def _examine(self, sock: socket.socket) -> Future[socket.socket] | None:
        """Whom it was for; None for somebody else."""
        if receive_exactly(sock, len(MAGIC)) != MAGIC:
            return None
        theirs, length = receive_exactly(sock, NONCE_BYTES), receive_exactly(sock, 1)[0]
        name = receive_exactly(sock, length)
        with self._lock:
            secret, coming = self._expected.get(name, (secrets.token_bytes(32), None))
        ours = secrets.token_bytes(NONCE_BYTES)
        sock.sendall(ours + proof(secret, b"door", theirs, ours, name))
        known = hmac.compare_digest(receive_exactly(sock, 32), proof(secret, b"dial", ours, theirs, name))
        if coming is None or not known:
            return None
        with self._lock:
            if self._expected.pop(name, None) is None:  # two came at once
                return None
        sock.sendall(b"\1")
        watch_link(sock)
        return coming


def dial(address: str, port: int, name: str, secret: bytes, seconds: float = DIAL_SECONDS) -> socket.socket:
    """A connection to a ``Door``. LinkError when nobody answers in time, or not who should."""
    deadline, sock = time.monotonic() + seconds, None
    try:
        while sock is None:
            try:
                sock = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        ours, label = secrets.token_bytes(NONCE_BYTES), name.encode()
        sock.sendall(MAGIC + ours + struct.pack("B", len(label)) + label)
        theirs = receive_exactly(sock, NONCE_BYTES)
        if not hmac.compare_digest(receive_exactly(sock, 32), proof(secret, b"door", ours, theirs, label)):
            sock.close()
            raise LinkError(f"{address}:{port} does not know the secret of {name}: another server listens there")
        sock.sendall(proof(secret, b"dial", theirs, ours, label))
        receive_exactly(sock, 1)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise LinkError(
            f"{name} does not reach {address}:{port}: {error.strerror or error}: hosts of a cluster must reach "
            "each other on all ports"
        ) from None
    sock.settimeout(None)
    watch_link(sock)
    return sock


def watch_link(sock: socket.socket, silent_seconds: float = SILENT_SECONDS) -> None:
    """Have the kernel end the connection when the other host is gone: then reads and writes fail."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": round(silent_seconds)}
    for name, value in {**options, "TCP_USER_TIMEOUT": round(1000 * silent_seconds)}.items():
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen_on(address: str) -> socket.socket:
    """A listening socket on a free port of this address, and of no other."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((address, 0))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise LinkError(f"cannot listen on {address}: {error.strerror}: is it this host's address?") from None
    return listener


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other side hung up")
        data += part
    return data
