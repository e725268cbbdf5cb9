"""What the Triton kernels share: programmatic dependent launch, and the accumulation of split sums.

A kernel of a decode step runs for a few microseconds, and the gap to the next is as long. With programmatic dependent
launch (Hopper and later) the next kernel's programs start while the last ones of this kernel still run: they
fetch weights, which no kernel writes, and wait only before they touch what others have made.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_dependent_launch(device: torch.device) -> bool:
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    return 8 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


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

    Grown before graphs are captured (the first, eager run of every shape sees to that), never while one is.
    """

    def __init__(self) -> None:
        self._floats: dict[torch.device, Tensor] = {}
        self._counters: dict[torch.device, Tensor] = {}

    def floats(self, count: int, device: torch.device) -> Tensor:
        have = self._floats.get(device)
        if have is None or have.numel() < count:
            have = torch.empty(max(count, 1 << 20), dtype=torch.float32, device=device)
            self._floats[device] = have
        return have

    def counters(self, count: int, device: torch.device) -> Tensor:
        have = self._counters.get(device)
        if have is None or have.numel() < count:
            have = torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device)
            self._counters[device] = have
        return have
