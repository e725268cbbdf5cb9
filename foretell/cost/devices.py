"""What makers say of their devices: memory, its bandwidth, dense operations, links. For those never measured.

Figures are of the data sheets, per device, without sparsity. ``layer_seconds`` is none of them: it is what a layer of
a decode step took on an H200 beyond its bytes (small launches, tails of kernels): 18 to 27 µs for three models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foretell.cost.hardware import Hardware

# Of the data sheet's rates an H200 gave 0.89 (a copy: 4.26 of 4.8 TB/s) and 0.72 (long prefill: 712 of 989 TFLOP/s).
READ_SHARE, FLOPS_SHARE = 0.89, 0.72
GB, TB, TFLOPS = 1e9, 1e12, 1e12
GPU_LAYER_SECONDS = 20e-6


@dataclass(frozen=True, slots=True)
class Device:
    """One device at its best. ``link_bytes_per_second``: to a peer in the same machine, one direction."""

    name: str
    memory_bytes: float
    read_bytes_per_second: float
    flops_per_second: Mapping[str, float]
    link_bytes_per_second: float
    layer_seconds: float = GPU_LAYER_SECONDS
    step_seconds: float = 1e-4  # the engine's own, between two steps

    def sustained(self) -> Hardware:
        """The rates that engines reach, after ``READ_SHARE`` and ``FLOPS_SHARE``."""
        flops = {dtype: rate * FLOPS_SHARE for dtype, rate in self.flops_per_second.items()}
        return Hardware(1, self.read_bytes_per_second * READ_SHARE, flops)


def _gpu(name: str, memory: float, read: float, half: float, single: float, link: float) -> Device:
    """Memory in GB, reads in TB/s, bfloat16 and float32 in TFLOP/s, link in GB/s."""
    flops = {"bfloat16": half * TFLOPS, "float16": half * TFLOPS, "float32": single * TFLOPS}
    return Device(name, memory * GB, read * TB, flops, link * GB)


DEVICES: dict[str, Device] = {
    "h100": _gpu("NVIDIA H100 SXM 80 GB", 80, 3.35, 989, 67, 450),
    "h200": _gpu("NVIDIA H200 SXM 141 GB", 141, 4.8, 989, 67, 450),
    "b200": _gpu("NVIDIA B200 180 GB", 180, 8.0, 2250, 75, 900),
    "a100": _gpu("NVIDIA A100 SXM 80 GB", 80, 2.039, 312, 19.5, 300),
    "l40s": _gpu("NVIDIA L40S 48 GB", 48, 0.864, 362, 91.6, 32),
    "l4": _gpu("NVIDIA L4 24 GB", 24, 0.3, 121, 30.3, 32),
    "4090": _gpu("NVIDIA GeForce RTX 4090 24 GB", 24, 1.008, 165, 82.6, 32),
    "mi300x": _gpu("AMD Instinct MI300X 192 GB", 192, 5.3, 1307, 163, 64),
    # eight cores of 3 GHz with two 256-bit fused multiply-adds each, two channels of DDR5-4800
    "laptop": Device(
        "a laptop CPU, 8 cores, AVX2, DDR5", 16 * GB, 76.8 * GB,
        {"float32": 768e9, "bfloat16": 768e9, "float16": 768e9}, 20 * GB, layer_seconds=2e-5, step_seconds=2e-4,
    ),
}  # fmt: skip
