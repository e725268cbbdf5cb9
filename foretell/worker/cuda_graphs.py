"""Decode steps as CUDA graphs: hundreds of launches become one. Captured when a size is first needed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[int], Tensor]  # number of sequences → logits, all in static buffers


class StepGraphs(Protocol):
    """Something that runs a step of a padded number of sequences."""

    def size_for(self, num_seqs: int) -> int:
        """The smallest size that holds so many; 0 if none does."""
        ...

    def run(self, size: int, work: Work) -> Tensor: ...

    def release(self) -> None: ...


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps that waste an eighth at most: few graphs, little padding."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 64 else 16 if sizes[-1] < 256 else 32))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


class CudaGraphs:
    """One graph per size, sharing one memory pool: they run one after the other, and what they leave behind lies
    in static buffers."""

    def __init__(self, max_num_seqs: int) -> None:
        self.sizes = graph_sizes(max_num_seqs)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def size_for(self, num_seqs: int) -> int:
        at = bisect_left(self.sizes, num_seqs)
        return self.sizes[at] if at < len(self.sizes) else 0

    def run(self, size: int, work: Work) -> Tensor:
        """The step's logits. The first time, the step runs as it is, which compiles and warms what it needs, and is
        captured after that; capturing computes nothing."""
        found = self._graphs.get(size)
        if found is not None:
            found[0].replay()
            return found[1]
        logits = work(size)
        self._capture(size, work)
        return logits

    def _capture(self, size: int, work: Work) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            logits = work(size)
        finally:
            graph.capture_end()
        self._graphs[size] = (graph, logits)

    def release(self) -> None:
        self._graphs.clear()
