"""What passes between the HTTP process and the engine process: msgpack in frames over an inherited socket pair.

A frame is its length (four bytes, big-endian) and one message. Both sides decode into the types below and nothing
else. Whatever does not fit them ends the connection, never the process that reads it: the supervisor starts a new
engine, an engine without a parent leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Any

import msgspec

from foretell.config import ModelSpec
from foretell.core.messages import Output
from foretell.core.params import SamplingParams
from foretell.errors import ForetellError

MAX_FRAME_BYTES = 64 << 20
_LENGTH = Struct(">I")


class WireError(ForetellError):
    """The other side sent something that is no message, or more than a frame may hold."""


class Message(msgspec.Struct, array_like=True, tag=True):
    """The first element names the type, the others are its fields in order."""


# -- to the engine ----------------------------------------------------------------------------------


class Start(Message):
    """The first message: the fields of ``EngineOptions``."""

    options: dict[str, Any]


class Add(Message):
    """``params.n`` requests of one prompt, with ids from ``first_id`` on; ``arrival`` on CLOCK_MONOTONIC, seconds."""

    first_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    arrival: float


class Finish(Message):
    request_ids: list[int]
    reason: str


class Control(Message):
    """An admin command, answered between two steps."""

    call_id: int
    command: str
    arguments: dict[str, Any]


class Ping(Message):
    """Answered between two steps with ``Stats``."""


class Shutdown(Message):
    """End after the step in progress."""


# -- from the engine --------------------------------------------------------------------------------


class Phase(Message):
    """A phase of the start is done, and what it took."""

    name: str
    seconds: float


class Ready(Message):
    """The engine runs; what the other side must know of it. Sizes in bytes, lengths in tokens."""

    model: str
    spec: ModelSpec | None
    vocab_size: int
    eos_token_ids: list[int]
    max_model_len: int
    max_tokens_per_request: int  # less than max_model_len if the KV cache is small
    max_num_seqs: int
    dtype: str
    weight_format: str
    kernels: str
    weight_bytes: int
    kv_bytes: int
    kv_element_bytes: int
    kv_tokens: int  # that fit in the cache at once
    phases: dict[str, float]
    foretold: dict[str, float] = {}  # by the machine's calibration, if there is one: seconds and tokens per second


class Failed(Message):
    """The engine could not start, or has to end: one line that says why. ``user_error``: something to mend."""

    message: str
    user_error: bool


class Step(Message):
    """What one step brought: for most requests a token, for some more. ``now``: CLOCK_MONOTONIC, seconds."""

    now: float
    request_ids: list[int]
    token_ids: list[int]  # of those, in the same order
    news: list[Output]


class Refused(Message):
    """An ``Add`` that cannot run."""

    first_id: int
    message: str


class Answer(Message):
    """Of a ``Control``; ``error`` is a line if it failed."""

    call_id: int
    value: Any
    error: str | None = None


class Stats(Message):
    """``Engine.stats``; also the sign that the engine is alive."""

    figures: dict[str, Any]
    now: float = 0.0  # CLOCK_MONOTONIC of the engine's host, seconds


ToEngine = Start | Add | Finish | Control | Ping | Shutdown
FromEngine = Phase | Ready | Failed | Step | Refused | Answer | Stats

_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Message) -> bytearray:
    """A frame. WireError if it would be too long, or holds what msgpack cannot say."""
    frame = bytearray(_LENGTH.size)
    try:
        _encoder.encode_into(message, frame, _LENGTH.size)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"this cannot be sent to the engine process: {error}") from None
    size = len(frame) - _LENGTH.size
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a message of {size} bytes is longer than the {MAX_FRAME_BYTES} that a frame may have")
    _LENGTH.pack_into(frame, 0, size)
    return frame


def check_frame(frame: bytearray, decoder: msgspec.msgpack.Decoder[Any]) -> None:
    """WireError unless the other side will be able to read this frame."""
    _decoded(decoder, bytes(memoryview(frame)[_LENGTH.size :]))


def _decoded(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
        raise WireError(f"a frame holds no message: {str(error)[:200]}") from None


class FrameReader:
    """Bytes as they come → whole frames, decoded."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any], max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decoder = decoder
        self._max = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """The messages that ``data`` completes. WireError for what is none; the reader is spent then."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(buffer, start)
                if size > self._max:
                    raise WireError(f"a frame of {size} bytes was announced, and {self._max} are allowed")
                end = start + _LENGTH.size + size
                if len(buffer) < end:
                    break
                message = _decoded(self._decoder, bytes(memoryview(buffer)[start + _LENGTH.size : end]))
                start = end
                yield message
        finally:
            del buffer[:start]
