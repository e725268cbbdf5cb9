"""What the driver and its ranks tell each other: msgpack frames over a socket pair, typed on arrival."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import msgspec

from foretell.config import SchedulerConfig
from foretell.core.messages import Batch, ChunkResult
from foretell.core.structured import StructuredOutput

MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<Q")


class Setup(msgspec.Struct, tag=True):
    """Everything a rank needs to load its share and join the others. ``num_blocks``: per KV group; on GPUs the ranks
    find out together how many there are. ``device``: "cpu" or "cuda"."""

    model: str
    load_format: str
    dtype: str
    kernels: str
    batch_invariant: bool
    keep_quantised: bool
    num_threads: int
    seed: int
    tp: int
    pp: int
    rank: int
    num_blocks: list[int]
    config: SchedulerConfig
    store_url: str
    timeout_seconds: float
    offline: bool | None = True
    device: str = "cpu"
    memory_share: float = 0.9
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    quantization: str | None = None


class Step(msgspec.Struct, tag=True):
    """A batch; ``tokens``: by request, those sampled since it was last in a batch, for ranks that did not sample."""

    batch: Batch
    tokens: dict[int, list[int]]


class Prepare(msgspec.Struct, tag=True):
    """Compile this form, beside the steps; to the rank that samples. Answered with ``Prepared`` of that number."""

    number: int
    form: StructuredOutput


class Stop(msgspec.Struct, tag=True):
    """Nothing more comes."""


class Ready(msgspec.Struct, tag=True):
    """Loaded and met the others. Bytes as kept, and by which loading made the process grow; seconds by phase; on a
    GPU its memory by purpose."""

    weight_bytes: int
    resident_bytes: int
    weight_format: str
    kernels: str
    phases: dict[str, float]
    num_blocks: list[int]
    ledger: dict[str, int] = {}


class Done(msgspec.Struct, tag=True):
    """A finished batch, from the rank that sampled. Times on the machine's monotonic clock."""

    batch_id: int
    results: list[ChunkResult]
    started: float
    finished: float
    parts: dict[str, float]


class Prepared(msgspec.Struct, tag=True):
    """A form is ready, or why it cannot be; ``later``: it may be tried again."""

    number: int
    error: str = ""
    later: bool = False


class Beat(msgspec.Struct, tag=True):
    """From a rank's side thread: it lives, and this is what it is at."""

    phase: str


class Failed(msgspec.Struct, tag=True):
    """The rank gives up, for this reason."""

    reason: str


ToRank = Setup | Step | Prepare | Stop
ToDriver = Ready | Done | Prepared | Beat | Failed


class Channel:
    """One end of a connection. ``send`` may be called from several threads."""

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self.sock = sock
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(incoming).decode
        self._lock = threading.Lock()
        self._buffer = bytearray()

    def send(self, message: ToRank | ToDriver) -> None:
        """Raises OSError when the other end is gone."""
        self.send_frame(self.frame(message))

    def frame(self, message: ToRank | ToDriver) -> bytes:
        """The message as it travels, for several channels to send."""
        data = self._encode(message)
        return _LENGTH.pack(len(data)) + data

    def send_frame(self, frame: bytes) -> None:
        with self._lock:
            self.sock.sendall(frame)

    def receive(self) -> Any:
        """The next message; EOFError when the other end is gone. Blocks."""
        while (message := self.pop()) is None:
            self.fill()
        return message

    def fill(self) -> None:
        """Take in what has arrived (at least one byte). EOFError when the other end is gone."""
        data = self.sock.recv(1 << 20)
        if not data:
            raise EOFError("the other end of the channel is closed")
        self._buffer += data

    def pop(self) -> Any:
        """A whole message of those taken in, or None."""
        if len(self._buffer) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_FRAME_BYTES:
            raise EOFError(f"a frame of {length} bytes is beyond the limit")
        end = _LENGTH.size + length
        if len(self._buffer) < end:
            return None
        message = self._decode(bytes(self._buffer[_LENGTH.size : end]))
        del self._buffer[:end]
        return message

    def close(self) -> None:
        self.sock.close()
