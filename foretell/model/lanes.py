"""How a carrier brings pieces of files where they shall be: on a device through pinned memory, on the CPU at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.errors import ModelFormatError

PIECE_BYTES = 8 << 20  # each costs the interpreter's lock twice and more, so small ones are slow


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


def lane_to(device: torch.device) -> Callable[[Piece], None]:
    """What brings a piece, for the calling thread alone: its bytes are there when it returns."""
    if device.type == "cpu":
        return lambda piece: fill(piece, piece.target)
    torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]  # of this thread
    pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)

    def carry(piece: Piece) -> None:
        buffer = pinned[: len(piece.target)]
        fill(piece, buffer)
        piece.target.copy_(buffer)  # waits: one that read on into a second buffer meanwhile was no faster

    return carry


def fill(piece: Piece, tensor: Tensor) -> None:
    array: Any = tensor.numpy()
    read(piece, memoryview(array))


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
