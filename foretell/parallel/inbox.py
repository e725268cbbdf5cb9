"""Memory of a GPU that the other GPUs of its host write to, and the sums that go through it."""

from __future__ import annotations

import socket
import zlib
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
import triton.language as tl
from torch import Tensor

from foretell.kernels import triton_ranks
from foretell.kernels.cuda_tuning import power_of_two
from foretell.kernels.triton_common import launch, num_multiprocessors

FEW_BYTES = 512 << 10  # of a sum whose words travel with a number each: twice the bytes, no second trip
MOST_BYTES = 16 << 20  # of a sum that goes this way at all
MOST_NORMED_ROWS = 64  # a program each, all of them running at once
MOST_NORMED_WORDS = 8192  # of a row, which one program holds
BLOCK_WORDS, BLOCK_MANY = 1024, 2048
FLAGS = 1024  # programs at most
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Inbox:
    """Sums of at most ``MOST_BYTES`` over the group, in one order of ranks and with the same bits on all of them."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """RuntimeError where the GPUs cannot reach each other's memory. All ranks of the group call it at once, and
        nobody may write before all have said that theirs is there (``make_inbox``)."""
        import torch.distributed._symmetric_memory as symmetric  # of torch, public in all but its name

        self.rank, self.size, self.device = dist.get_rank(group), dist.get_world_size(group), device
        self.few, self.many = FEW_BYTES // 4, MOST_BYTES // 4  # words of one rank in one half
        parts = [8 * self.few, 4 * self.many, 4 * FLAGS]  # bytes of them
        self.memory: Tensor = symmetric.empty(2 * self.size * sum(parts), dtype=torch.uint8, device=device)
        self.memory.zero_()
        self._handle: Any = symmetric.rendezvous(self.memory, group)
        starts = [2 * self.size * sum(parts[:i]) for i in range(len(parts))]
        self.numbered, self.plain, self.flags = (
            torch.tensor([at + start for at in self._handle.buffer_ptrs], dtype=torch.int64, device=device)
            for start in starts
        )
        self.state = torch.tensor([1, 0], dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)

    def takes(self, x: Tensor) -> bool:
        """Whether ``sum`` is for this tensor."""
        aligned = x.is_contiguous() and x.nbytes % 4 == 0 and x.data_ptr() % 16 == 0
        return aligned and x.dtype in KINDS and 0 < x.nbytes <= MOST_BYTES

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks, a new tensor."""
        y = torch.empty_like(x)
        words, units = x.nbytes // 4, num_multiprocessors(self.device)
        if x.nbytes <= FEW_BYTES:
            launch(
                triton_ranks.sum_ranks, (min(-(-words // BLOCK_WORDS), units),),
                _words(x), _words(y), self.numbered, self.state, words,
                KINDS[x.dtype], self.rank, self.size, self.few, BLOCK_WORDS, num_warps=4, device=self.device,
            )  # fmt: skip
        else:
            launch(
                triton_ranks.sum_many, (min(-(-words // BLOCK_MANY), units, FLAGS),),
                _words(x), _words(y), self.plain, self.flags, self.state, words,
                KINDS[x.dtype], self.rank, self.size, self.many, FLAGS, BLOCK_MANY, num_warps=8, device=self.device,
            )  # fmt: skip
        return y

    def norms(self, x: Tensor) -> bool:
        """Whether ``sum_add_norm`` is for rows like these, [M, C]."""
        fits = x.shape[1] % 2 == 0 and x.shape[1] // 2 <= MOST_NORMED_WORDS
        return fits and x.element_size() == 2 and self.takes(x)

    def sum_add_norm(self, y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(s), s) with s = x + (y summed over the ranks); [M, C], as ``norms`` wants them."""
        x = x.contiguous()
        normed, sums = torch.empty_like(x), torch.empty_like(x)
        rows, C = x.shape
        block, few = power_of_two(C // 2), x.nbytes <= FEW_BYTES and rows <= MOST_NORMED_ROWS
        warps, tensors = min(max(block // 256, 1), 16), (_words(y), _words(x), weight, _words(normed), _words(sums))
        if few:
            launch(
                triton_ranks.sum_add_norm, (rows,),
                *tensors, self.numbered, self.state, C, eps,
                KINDS[x.dtype], self.rank, self.size, self.few, block, num_warps=warps, device=self.device,
            )  # fmt: skip
        else:
            launch(
                triton_ranks.sum_add_norm_many, (min(rows, num_multiprocessors(self.device), FLAGS),),
                *tensors, self.plain, self.flags, self.state, rows, C, eps,
                KINDS[x.dtype], self.rank, self.size, self.many, FLAGS, block, num_warps=warps, device=self.device,
            )  # fmt: skip
        return normed, sums


def make_inbox(group: dist.ProcessGroup, device: torch.device) -> Inbox | None:
    """None where a rank cannot reach another's memory (no NVLink nor peer access, or another host)."""
    host = zlib.crc32(socket.gethostname().encode())
    hosts = torch.tensor([host, -host], dtype=torch.int64, device=device)
    dist.all_reduce(hosts, dist.ReduceOp.MAX, group=group)
    if hosts.tolist() != [host, -host]:
        return None
    made: Inbox | None = None
    with suppress(RuntimeError, ImportError):
        made = Inbox(group, device)
    works = torch.tensor([made is not None], dtype=torch.int32, device=device)
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    return made if works.item() else None


def _words(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.int32)
