"""What this machine gives at best: memory reads and matrix products, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

BUFFER_BYTES = 256 * 2**20  # larger than any cache a few cores have to themselves
SLICES = 4  # of the buffer, read in turn: when one comes up again, the others have pushed it out of the cache
ROWS, WIDTH = 256, 1024  # of the measured product [256, 1024] · [1024, 1024]: a prompt chunk and a middling layer
SECONDS_EACH = 0.1  # for runs of a few milliseconds: on a busy machine some of them go undisturbed

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class Hardware:
    """Best rates seen with ``num_threads`` threads; ``flops_per_second`` by the dtype of the product."""

    num_threads: int
    read_bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def rate(self, dtype: str) -> float:
        """FLOP/s for weights of this dtype: they may always be widened, so never less than float32 gives."""
        wide = self.flops_per_second["float32"]
        return max(wide, self.flops_per_second.get(dtype, wide))

    def best_with(self, other: Hardware) -> Hardware:
        """The better of both in each rate."""
        flops = {name: max(rate, other.flops_per_second[name]) for name, rate in self.flops_per_second.items()}
        return Hardware(self.num_threads, max(self.read_bytes_per_second, other.read_bytes_per_second), flops)

    def exceeds(self, other: Hardware, factor: float) -> bool:
        """Whether some rate is more than ``factor`` times the other's."""
        pairs = [(self.read_bytes_per_second, other.read_bytes_per_second)]
        pairs += [(rate, other.flops_per_second[name]) for name, rate in self.flops_per_second.items()]
        return any(mine > factor * theirs for mine, theirs in pairs)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flops_per_second": dict(self.flops_per_second)}

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in self.flops_per_second.items())
        return f"{self.num_threads} threads read {self.read_bytes_per_second / 1e9:.1f} GB/s, {rates}"


_known: dict[int, Hardware] = {}  # by number of threads


def measure_hardware(*, again: bool = False) -> Hardware:
    """This process's machine with torch's current number of threads; measured once for each number. ``again``
    measures once more and keeps the best rates: what a busy machine gave the first time is no bound."""
    import torch

    num_threads = torch.get_num_threads()
    known = _known.get(num_threads)
    if known is None or again:
        measured = _measure(num_threads)
        _known[num_threads] = measured if known is None else known.best_with(measured)
    return _known[num_threads]


def _measure(num_threads: int) -> Hardware:
    """With all threads and with one: beside busy neighbours, threads that wait for each other do less than one."""
    import torch

    best: Hardware | None = None
    try:
        for count in sorted({1, num_threads}):
            torch.set_num_threads(count)
            with torch.inference_mode():
                flops = {name: _product_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
                found = Hardware(num_threads, _read_rate(), flops)
            best = found if best is None else best.best_with(found)
    finally:
        torch.set_num_threads(num_threads)
    assert best is not None
    return best


def _read_rate() -> float:
    """Bytes per second of the better of two ways to read a buffer once and write next to nothing."""
    import torch

    slices = torch.empty(SLICES, BUFFER_BYTES // (SLICES * 4 * 4096), 4096).fill_(1.0)
    vector, in_turn = torch.ones(4096), cycle(slices)
    best = min(_best_seconds(lambda: next(in_turn) @ vector), _best_seconds(lambda: next(in_turn).sum()))
    return BUFFER_BYTES / SLICES / best


def _product_rate(dtype: Any) -> float:
    import torch

    x, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    return 2 * ROWS * WIDTH * WIDTH / _best_seconds(lambda: torch.nn.functional.linear(x, weight))


def _best_seconds(run: Callable[[], object]) -> float:
    """The shortest of as many runs as fit the time, after one to warm up: what is left out is interference."""
    run()
    best, stop = float("inf"), time.perf_counter() + SECONDS_EACH
    while True:
        started = time.perf_counter()
        run()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended >= stop:
            return best
