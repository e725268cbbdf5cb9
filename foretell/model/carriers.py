"""Bytes of files on their way into tensors, by threads that do nothing else.

Who builds a model says what will be taken, and in what order. The planner, one thread, makes the tensors, a window
ahead of those already taken, and cuts them into pieces; carriers read a piece each from its file and copy it to the
device. Who takes a tensor waits until its last piece has arrived.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from foretell.cpus import usable_cpus
from foretell.model import lanes
from foretell.model.lanes import Parcel, Piece, unreadable

CARRIERS = 12  # the fastest of 8, 12, 16 and 24 on 16 cores
WINDOW_BYTES = 2 << 30  # of tensors that are made and not yet taken


@dataclass(slots=True, eq=False)
class Crate:
    """Parcels that lie one behind the other in memory, and are begun together."""

    parcels: list[Parcel]
    begun: bool = False

    @property
    def nbytes(self) -> int:
        return sum(parcel.nbytes for parcel in self.parcels)


class Carriers:
    """Any number of threads may take tensors, in any order, announced or not. ``place`` says of a tensor's name in
    which file it lies, from which byte on, and how many bytes it has."""

    def __init__(self, device: torch.device, place: Callable[[str], tuple[Path, int, int]]) -> None:
        self.device, self._place = device, place
        self._changed = threading.Condition()  # guards what follows; the planner waits for it
        self._ahead: deque[Crate] = deque()
        self._wanted: deque[Crate] = deque()  # somebody waits for them, and they are not begun
        self._known: dict[str, tuple[Parcel, Crate]] = {}  # announced or waited for, and not yet taken
        self._held = 0  # bytes of tensors that are made and not yet taken
        self._under_way = 0  # parcels that are begun and have not arrived
        self._error: BaseException | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._files: dict[Path, int] = {}  # the planner's

    def expect(self, crates: Iterable[Sequence[str]]) -> None:
        """These tensors will be taken, in about this order: they are on their way from now on. Tensors of one crate
        will lie one behind the other in one piece of memory."""
        with self._changed:
            self._start()  # first: pinning memory takes longer than what follows
            self._ahead.extend(self._packed(names) for names in crates)
            self._changed.notify()

    def take(self, name: str) -> Tensor:
        """The tensor's bytes on the device, uint8 [nbytes]; who takes it again has it carried again. Raises what a
        carrier failed with, ModelFormatError where it is the file's fault."""
        with self._changed:
            if self._error is not None:
                raise self._error
            assert not self._closed, "nothing is carried any more"
            if name not in self._known:
                self._packed([name])
            parcel, crate = self._known[name]
            if not crate.begun:
                self._wanted.append(crate)
                self._changed.notify()
            self._start()
        parcel.arrived.wait()
        with self._changed:
            if self._error is not None:
                raise self._error
            assert not self._closed, "closed while somebody waited"
            if name in self._known and self._known[name][0] is parcel:  # not if another took it at the same time
                del self._known[name]
                self._held -= parcel.nbytes
                self._changed.notify()
        tensor = parcel.tensor
        assert tensor is not None
        if self.device.type == "cuda" and (stream := torch.cuda.current_stream(self.device)).cuda_stream:
            tensor.record_stream(stream)  # its memory belongs to the default stream, and here another uses it
        return tensor

    def close(self) -> None:
        """Ends the threads; what they still had to carry is let go of."""
        self._stop(None)
        for thread in self._threads:
            thread.join()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # nothing writes any more to memory that is let go of
        for file in self._files.values():
            os.close(file)
        self._threads.clear()
        self._files.clear()
        self._known.clear()
        self._ahead.clear()
        self._wanted.clear()
        self._pieces = SimpleQueue()

    def _packed(self, names: Sequence[str]) -> Crate:
        crate = Crate([Parcel(*self._place(name)) for name in names])
        self._known.update({name: (parcel, crate) for name, parcel in zip(names, crate.parcels, strict=True)})
        return crate

    def _start(self) -> None:
        if not self._threads:
            jobs = [self._plan] + [self._carry] * min(CARRIERS, max(4, usable_cpus()))
            self._threads = [threading.Thread(target=job, name="foretell-carry", daemon=True) for job in jobs]
            for thread in self._threads:
                thread.start()

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._error, self._closed = self._error or error, True
            for _ in self._threads:
                self._pieces.put(None)
            for parcel, _ in self._known.values():
                parcel.arrived.set()
            self._changed.notify()

    def _plan(self) -> None:
        try:
            while (crate := self._next_crate()) is not None:
                self._begin(crate)
                del crate
        except BaseException as error:
            self._stop(error)

    def _next_crate(self) -> Crate | None:
        """What to begin: the next one in order if the window allows. What somebody waits for goes first only where
        nothing else would come: then all that was begun has arrived, and nobody takes it."""
        with self._changed:
            while not self._closed:
                while self._ahead and self._ahead[0].begun:
                    self._ahead.popleft()
                crate = None
                if self._ahead and (not self._held or self._held + self._ahead[0].nbytes <= WINDOW_BYTES):
                    crate = self._ahead.popleft()
                elif self._wanted and not (self._ahead and self._under_way):
                    crate = self._wanted.popleft()
                if crate is not None:
                    crate.begun = True
                    self._wanted = deque(other for other in self._wanted if not other.begun)
                    self._held += crate.nbytes
                    self._under_way += len(crate.parcels)
                    return crate
                self._changed.wait()
        return None

    def _begin(self, crate: Crate) -> None:
        memory = torch.empty(crate.nbytes, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.default_stream(self.device).synchronize()  # what had this memory before is done with it
        begin, size = 0, lanes.PIECE_BYTES
        for parcel in crate.parcels:
            parcel.tensor = tensor = memory[begin : begin + parcel.nbytes]
            begin += parcel.nbytes
            file, starts = self._opened(parcel.path), range(0, max(1, parcel.nbytes), size)
            parcel.missing = len(starts)
            for at in starts:
                self._pieces.put(Piece(parcel, file, parcel.offset + at, tensor[at : at + size]))

    def _opened(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise unreadable(path, error) from None
        return self._files[path]

    def _carry(self) -> None:
        try:
            bring = lanes.lane_to(self.device)
            while (piece := self._pieces.get()) is not None and not self._closed:
                bring(piece)
                self._arrived(piece.parcel)
                del piece  # who waits for the next one holds no tensor
        except BaseException as error:
            self._stop(error)

    def _arrived(self, parcel: Parcel) -> None:
        with self._changed:
            parcel.missing -= 1
            if not parcel.missing:
                self._under_way -= 1
                parcel.arrived.set()
            if not self._under_way:
                self._changed.notify()
