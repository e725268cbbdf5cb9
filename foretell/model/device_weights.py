"""Weights that go to a GPU: made there, or read from files by many threads through pinned memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from foretell.config import ModelSpec
from foretell.model.carriers import Carriers
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
    transforms and the search for NaN are the device's work. Any number of threads may read, in any order; ``start``
    comes before if it is known what will be read, ``check`` after everything, and ``close`` at the end."""

    def __init__(self, source: TensorSource, spec: ModelSpec, device: torch.device) -> None:
        super().__init__(source, spec)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # this thread's; new ones begin with the first
        self.device = device
        self._carried: tuple[SafetensorsSource, Carriers] | None = None  # other formats are read by who asks
        if isinstance(source, SafetensorsSource):
            self._carried = source, Carriers(device, source.place)
        self._sums: list[tuple[str, Tensor]] = []

    def start(self, groups: Iterable[Sequence[str]], dtype: torch.dtype) -> None:
        """What will be read, in about this order, is on its way from now on. Weights of a group that are stored in
        ``dtype``, and as they shall be, lie one behind the other: to stack them takes no copy."""
        if self._carried is None:
            return
        file, carriers = self._carried
        crates: list[list[str]] = []
        seen: set[str] = set()
        for group in groups:
            places = [self.sources[name] for name in group]
            names = [name for name in dict.fromkeys(place.name for place in places) if name not in seen]
            seen.update(names)
            as_they_are = all(
                place.transform is None and STORED[file.stored_dtype(place.name)] is dtype for place in places
            )
            crates += [names] if as_they_are else [[name] for name in names]
        carriers.expect(crates)

    def check(self) -> None:
        """ModelFormatError naming a tensor that is not finite."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._sums and not bool(torch.stack([total for _, total in self._sums]).isfinite().all()):
            raise not_finite(next(name for name, total in self._sums if not bool(total.isfinite())))
        self._sums.clear()

    def close(self) -> None:
        """Ends the threads that carry. Weights that were read stay."""
        if self._carried is not None:
            self._carried[1].close()

    def _read_part(self, name: str, place: Source, dtype: torch.dtype, take: Take) -> Tensor:
        return super()._read_part(name, place, dtype, take).to(self.device)

    def _read_raw(self, place: Source, dtype: torch.dtype) -> Tensor:
        last = self._kept.last
        if last is not None and last[:2] == (place.name, dtype):
            return last[2]
        self._kept.last = last = None
        tensor = self._fetch(place.name, dtype)
        self._note(place.name, tensor)
        if place.transform is not None:
            self._kept.last = (place.name, dtype, tensor)
        return tensor

    def _note(self, name: str, tensor: Tensor) -> None:
        """For ``check``: a sum is not finite when any element is not."""
        self._sums.append((name, tensor.sum(dtype=torch.float32)))

    def _fetch(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor on the device, in ``dtype``."""
        if self._carried is None:
            return self.source.read(name, dtype).to(self.device)
        file, carriers = self._carried
        return carriers.take(name).view(STORED[file.stored_dtype(name)]).view(file.shape(name)).to(dtype)
