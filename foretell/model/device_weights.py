"""Weights that go to a GPU: made there, or read from files by many threads through pinned memory."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.errors import ModelFormatError
from foretell.model.naming import Source
from foretell.model.parameters import weight_shapes
from foretell.model.weights import FileWeights, Take, hash_of, not_finite
from foretell.store.gguf_rows import QuantisedRows
from foretell.store.safetensors_file import SafetensorsSource
from foretell.store.tensors import TensorSource

STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
PIECE_BYTES = 8 << 20  # of a file, read into pinned memory while the piece before it crosses the bus
SHARED_BYTES = 256 << 20  # a tensor this large (embedding, head) is read by several threads
SHARERS = 6


class DeviceDummyWeights:
    """Random weights within ±1e-3 (norms 1, biases 0), made on the device in milliseconds: as much memory and work
    as real ones, and no zeros, which multiply faster than numbers do."""

    BLOCK = (1 << 22) + 7  # odd, so that repetitions do not align with rows
    SCALE = 1e-3

    def __init__(self, spec: ModelSpec, seed: int, device: torch.device) -> None:
        self.shapes = weight_shapes(spec)
        self.device = device
        generator = torch.Generator(device).manual_seed(seed)
        self.block = (torch.rand(self.BLOCK, generator=generator, device=device) * 2 - 1) * self.SCALE

    def blocks(self, name: str) -> QuantisedRows | None:
        return None

    def read(self, name: str, dtype: torch.dtype, take: Take | None = None) -> Tensor:
        whole = self._whole(name, dtype)
        return whole if take is None else take(whole).clone()  # not the rest with it

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self.shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=dtype, device=self.device)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self.device)
        size = torch.Size(shape).numel()
        block = self.block.roll(-(hash_of(name) % self.BLOCK)).to(dtype)
        tensor = torch.empty(size, dtype=dtype, device=self.device)
        whole = size // self.BLOCK * self.BLOCK
        tensor[:whole].view(-1, self.BLOCK).copy_(block)
        tensor[whole:].copy_(block[: size - whole])
        return tensor.view(shape)


class DeviceFileWeights(FileWeights):
    """Weights of files, on the device: what is stored as it shall be kept crosses the bus as it is, and casts,
    transforms and the search for NaN are the device's work. Any number of threads may read; ``check`` comes last."""

    def __init__(self, source: TensorSource, spec: ModelSpec, device: torch.device) -> None:
        super().__init__(source, spec)
        self.device = device
        self._lane = _Lanes(device)
        self._sharers = ThreadPoolExecutor(SHARERS, thread_name_prefix="foretell-read")
        self._sums: list[tuple[str, Tensor]] = []

    def _read_raw(self, place: Source, dtype: torch.dtype) -> Tensor:
        last = self._kept.last
        if last is not None and last[:2] == (place.name, dtype):
            return last[2]
        self._kept.last = last = None
        tensor = self._fetch(place.name, dtype)
        self._sums.append((place.name, tensor.sum(dtype=torch.float32)))
        if place.transform is not None:
            self._kept.last = (place.name, dtype, tensor)
        return tensor

    def _fetch(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor on the device, in ``dtype``."""
        if not isinstance(self.source, SafetensorsSource):
            return self.source.read(name, dtype).to(self.device)
        path, offset, nbytes = self.source.place(name)
        lane = self._lane.mine()
        raw = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        if nbytes < SHARED_BYTES:
            lane.read(path, offset, raw)
        else:
            lane.stream.synchronize()  # what had this memory before must be done with it before others write there
            share = -(-nbytes // SHARERS)
            parts = [(path, offset + at, raw[at : at + share]) for at in range(0, nbytes, share)]
            for _ in self._sharers.map(lambda part: self._lane.mine().read_whole(*part), parts):
                pass
        return raw.view(STORED[self.source.stored_dtype(name)]).view(self.source.shape(name)).to(dtype)

    def check(self) -> None:
        """ModelFormatError naming a tensor that is not finite."""
        self._sharers.shutdown()
        torch.cuda.synchronize(self.device)
        if self._sums and not bool(torch.stack([total for _, total in self._sums]).isfinite().all()):
            raise not_finite(next(name for name, total in self._sums if not bool(total.isfinite())))
        self._sums.clear()


class _Lanes(threading.local):
    """Each thread's own way to the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lane: _Lane | None = None

    def mine(self) -> _Lane:
        if self.lane is None:
            self.lane = _Lane(self.device)
        return self.lane


class _Lane:
    """A stream and two pieces of pinned memory: while one crosses the bus, the other is read into."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self.turn = 0
        torch.cuda.set_stream(self.stream)  # of this thread: casts and products of parts are in order with the copies

    def read(self, path: Path, offset: int, raw: Tensor) -> None:
        """The file's bytes from ``offset`` on into ``raw`` [bytes] uint8, in order with this lane's stream."""
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                for at in range(0, len(raw), PIECE_BYTES):
                    self._send(file, path, offset + at, raw[at : at + PIECE_BYTES])
            finally:
                os.close(file)
        except OSError as error:
            raise ModelFormatError(f"{path.name} cannot be read: {error.strerror}") from None

    def read_whole(self, path: Path, offset: int, raw: Tensor) -> None:
        """The same, and done when this returns."""
        self.read(path, offset, raw)
        self.stream.synchronize()

    def _send(self, file: int, path: Path, offset: int, target: Tensor) -> None:
        self.turn = 1 - self.turn
        self.sent[self.turn].synchronize()
        piece = self.pinned[self.turn][: len(target)]
        array: Any = piece.numpy()
        view, done = memoryview(array), 0
        while done < len(view):
            count = os.preadv(file, [view[done:]], offset + done)
            if count == 0:
                raise ModelFormatError(f"{path.name} ends in the middle of a tensor; fetch it again")
            done += count
        target.copy_(piece, non_blocking=True)
        self.sent[self.turn].record(self.stream)
