"""Kernel backends behind one interface; ``get_kernels`` chooses."""

from __future__ import annotations

import os

from foretell.errors import ConfigError
from foretell.kernels.base import Kernels
from foretell.kernels.cpu import CpuKernels
from foretell.kernels.cpu_build import BuildError
from foretell.kernels.reference import ReferenceKernels

__all__ = ["Kernels", "get_kernels"]


def get_kernels(name: str = "auto", *, device: str = "cpu", batch_invariant: bool = False) -> Kernels:
    """The backend called ``name``; "auto" takes the C++ one on a CPU that can build it, Triton's on a GPU where
    triton is installed, else reference.

    FORETELL_KERNELS overrides "auto". A reference backend chosen for want of a better one says why in
    its ``reason``. ``batch_invariant``: a row's result may not depend on the rows beside it.
    """
    if name == "auto":
        name = os.environ.get("FORETELL_KERNELS") or "auto"
    if name == "reference":
        return ReferenceKernels()
    if name == "cuda" or (name == "auto" and device == "cuda"):
        try:
            from foretell.kernels.cuda import CudaKernels
        except ImportError as error:  # triton comes with torch's CUDA builds
            if name == "cuda":
                raise ConfigError(f"the cuda kernels cannot be used: {error}") from error
            return ReferenceKernels(str(error))
        return CudaKernels(batch_invariant)
    if name == "auto" and device != "cpu":
        return ReferenceKernels(f"the C++ kernels run on the CPU, not on {device}")
    if name in ("auto", "cpu"):
        try:
            return CpuKernels(batch_invariant)
        except BuildError as error:
            if name == "cpu":
                raise ConfigError(f"the cpu kernels cannot be used: {error}") from error
            return ReferenceKernels(str(error))
    raise ConfigError(f"no kernel backend is called {name!r}: choose auto, cuda, cpu or reference")
