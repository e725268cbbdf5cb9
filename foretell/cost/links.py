"""What it costs to talk: collectives and transfers by bytes, ranks and link. A latency and a bandwidth each.

Sources: the cost of a collective as α + bytes·β, Thakur et al. 2005, "Optimization of collective communication
operations in MPICH"; NCCL's bandwidth factor 2·(n-1)/n of an all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Between ranks of one layout. Seconds that the smallest message takes, and bytes per second of a large one, in
    one direction."""

    name: str
    latency_seconds: float
    bytes_per_second: float

    def sum_seconds(self, ranks: int, num_bytes: float) -> float:
        """An all-reduce: each rank sends and receives 2·(n-1)/n of the bytes."""
        if ranks == 1:
            return 0.0
        return self.latency_seconds + 2 * (ranks - 1) / ranks * num_bytes / self.bytes_per_second

    def gather_seconds(self, ranks: int, num_bytes: float) -> float:
        """All parts to all ranks; ``num_bytes`` of the whole."""
        if ranks == 1:
            return 0.0
        return self.latency_seconds + (ranks - 1) / ranks * num_bytes / self.bytes_per_second

    def send_seconds(self, num_bytes: float) -> float:
        """From one stage to the next."""
        return self.latency_seconds + num_bytes / self.bytes_per_second


# Two H200 (NVLink): a sum through each other's memory took 3.5 µs for 8 KB, 19.2 for 4 MB, 65 for 16 MB, with NCCL
# 153 µs for 32 MB (bench/gpu/several.py, sums): 16 MB / (65 - 3.5) µs.
GPU_LATENCY, GPU_SHARE = 4e-6, 0.6  # of the data sheet's rate, one direction
# Processes of one machine (gloo over loopback): tenths of a millisecond for anything small
CPU_LINK = Link("processes of one machine", 2e-4, 2e9)


def gpu_link(name: str, bytes_per_second: float) -> Link:
    """Between GPUs of one machine; ``bytes_per_second`` as the data sheet has it, in one direction."""
    return Link(name, GPU_LATENCY, bytes_per_second * GPU_SHARE)
