"""What the Triton kernels share: programmatic dependent launch, and the accumulation of split sums.

A kernel of a decode step runs for a few microseconds, and the gap to the next is as long. With programmatic dependent
launch (Hopper and later) the next kernel's programs start while the last ones of this kernel still run: they
fetch weights, which no kernel writes, and wait only before they touch what others have made.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from foretell.kernels.cublaslt import ManyRows, many_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_dependent_launch(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def is_hopper(device: torch.device) -> bool:
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    capability = (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10):
        return 227 << 10
    return 163 << 10 if capability in ((8, 0), (8, 7)) else 99 << 10


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch that allows the kernel before it to overlap."""
    overlap = has_dependent_launch(device)
    return {"PDL": overlap, "launch_pdl": overlap} if not INTERPRETED else {"PDL": False}


def set_descriptor_memory(device: torch.device) -> None:
    """Where a kernel that makes tensor descriptors keeps them."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Before this, only weights may be read and nothing written."""
    if PDL:
        gdc_wait()


@triton.jit
def prefetch(pointers, PDL: tl.constexpr):
    """Ask for the 128-byte lines at these addresses: into the L2 cache, waiting for nothing."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64, bitcast=True)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def activated(x, KIND: tl.constexpr):
    """x float32 through the activation."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        t = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * t))
    else:
        return tl.where(x < 0.0, 0.0, x)


class Scratch:
    """Float32 work space and arrival counters of kernels that split a sum. Counters are zero between launches.

    What was handed out stays where it is: a captured graph goes on using it after a larger one was asked for.
    """

    def __init__(self) -> None:
        self._many_rows: dict[torch.device, ManyRows | None] = {}
        self._floats: dict[torch.device, list[Tensor]] = {}
        self._counters: dict[torch.device, list[Tensor]] = {}

    def floats(self, count: int, device: torch.device) -> Tensor:
        have = self._floats.setdefault(device, [])
        if not have or have[-1].numel() < count:
            have.append(torch.empty(max(count, 1 << 20), dtype=torch.float32, device=device))
        return have[-1]

    def counters(self, count: int, device: torch.device) -> Tensor:
        have = self._counters.setdefault(device, [])
        if not have or have[-1].numel() < count:
            have.append(torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device))
        return have[-1]

    def many_rows(self, device: torch.device) -> ManyRows | None:
        """The library for large products, with work space of its own; None where there is none."""
        if device not in self._many_rows:
            self._many_rows[device] = many_rows(device)
        return self._many_rows[device]


class Launcher(threading.local):
    """Launches kernels, or in a thread that asked for it only compiles them (see foretell.kernels.cuda_ahead)."""

    compiling = False

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, **options: Any
    ) -> None:
        options |= launch_options(device)
        if self.compiling:
            kernel.warmup(*arguments, grid=grid, **options)
        else:
            kernel[grid](*arguments, **options)


launch = Launcher()
