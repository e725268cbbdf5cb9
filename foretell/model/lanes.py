"""How a carrier brings pieces of files where they shall be: on a device through pinned memory, on the CPU at once."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from foretell.errors import ModelFormatError

PIECE_BYTES = 8 << 20  # each costs the interpreter's lock twice and more, so small ones are slow
BUFFERS = 1  # of a carrier; with one it waits for its copies, with more it reads while the piece before is copied


@dataclass(slots=True, eq=False)
class Parcel:
    """A tensor's bytes: where they lie in a file, and where they go."""

    path: Path
    offset: int
    nbytes: int
    tensor: Tensor | None = None  # uint8, once it is begun
    missing: int = 0  # pieces that have not arrived
    arrived: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class Piece:
    """What a carrier takes at a time: PIECE_BYTES at most."""

    parcel: Parcel
    file: int
    offset: int
    target: Tensor


class Lane(Protocol):
    """One carrier's way to the device."""

    def carry(self, piece: Piece) -> list[Parcel]:
        """Sends a piece on its way, or brings it; the parcels of pieces that have arrived by now."""
        ...

    def drain(self) -> list[Parcel]:
        """Waits for those under way."""
        ...


def lane_to(device: torch.device) -> Lane:
    """The calling thread's own."""
    return MemoryLane() if device.type == "cpu" else DeviceLane(device)


def read(piece: Piece, view: memoryview) -> None:
    """The piece's bytes of its file."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(piece.file, [view[done:]], piece.offset + done)
        except OSError as error:
            raise unreadable(piece.parcel.path, error) from None
        if count == 0:
            raise ModelFormatError(f"{piece.parcel.path.name} ends in the middle of a tensor; fetch it again")
        done += count


def unreadable(path: Path, error: OSError) -> ModelFormatError:
    return ModelFormatError(f"{path.name} cannot be read: {error.strerror}")


class MemoryLane:
    """To tensors of the CPU: what is read is there."""

    def carry(self, piece: Piece) -> list[Parcel]:
        array: Any = piece.target.numpy()
        read(piece, memoryview(array))
        return [piece.parcel]

    def drain(self) -> list[Parcel]:
        return []


class DeviceLane:
    """A stream and pinned memory. With one buffer a piece is there when ``carry`` returns: while it crosses the bus
    other carriers read. With more, it arrives while this one reads the next, and is known to when its buffer's turn
    comes again."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self.stream)  # of this thread
        self.pinned = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)]
        self.sent = [torch.cuda.Event() for _ in self.pinned]  # type: ignore[no-untyped-call]
        self.parcels: list[Parcel | None] = [None for _ in self.pinned]  # whose pieces are in the buffers
        self.turn = 0

    def carry(self, piece: Piece) -> list[Parcel]:
        self.turn = (self.turn + 1) % len(self.pinned)
        arrived = self._wait(self.turn)
        buffer = self.pinned[self.turn][: len(piece.target)]
        array: Any = buffer.numpy()
        read(piece, memoryview(array))
        if len(self.pinned) == 1:
            piece.target.copy_(buffer)
            return [piece.parcel]
        piece.target.copy_(buffer, non_blocking=True)
        self.sent[self.turn].record(self.stream)
        self.parcels[self.turn] = piece.parcel
        return arrived

    def drain(self) -> list[Parcel]:
        return [parcel for turn in range(len(self.pinned)) for parcel in self._wait(turn)]

    def _wait(self, turn: int) -> list[Parcel]:
        parcel, self.parcels[turn] = self.parcels[turn], None
        if parcel is None:
            return []
        self.sent[turn].synchronize()
        return [parcel]
