"""What GPU ranks say to each other: NCCL for large tensors, each other's memory for the sums of a few rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from foretell.kernels.base import Kernels
from foretell.parallel.comm import Communicator

if TYPE_CHECKING:
    from foretell.parallel.inbox import Inbox
    from foretell.parallel.layout import Layout, Place


class DeviceCommunicator(Communicator):
    """The groups of a rank that computes on a GPU. Sums and gathers can be part of a captured graph."""

    def __init__(
        self, layout: Layout, place: Place, store_url: str, kernels: Kernels, device: torch.device, *,
        timeout_seconds: float, ordered: bool,
    ) -> None:  # fmt: skip
        """``ordered``: sums of any size are added up in one order of ranks."""
        super().__init__(layout, place, store_url, backend="nccl", timeout_seconds=timeout_seconds, device=device)
        self.kernels, self.device, self.ordered = kernels, device, ordered
        ways = [  # a pair's own, so that no transfer waits for another's
            [dist.new_group([rank, rank + layout.tp]) for rank in range(stage * layout.tp, (stage + 1) * layout.tp)]
            for stage in range(layout.pp - 1)
        ]
        self.way_in = None if place.is_first else ways[place.stage - 1][place.shard]
        self.way_out = None if place.is_last else ways[place.stage][place.shard]
        self.inbox: Inbox | None = None
        if layout.tp > 1:
            from foretell.parallel.inbox import make_inbox

            self.inbox = make_inbox(self.group, device)

    def sum_(self, x: Tensor) -> Tensor:
        if self.ordered and self.size > 2:  # of two ranks the order makes no difference
            return self._gathered(x).float().sum(0).to(x.dtype)
        if self.inbox is not None and self.inbox.takes(x):
            return self.inbox.sum(x)
        dist.all_reduce(x, group=self.group)
        return x

    def summed(self, x: Tensor) -> Unsummed:
        return Unsummed(self, x)

    def gather(self, x: Tensor) -> Tensor:
        return self._gathered(x).permute(1, 0, 2).reshape(x.shape[0], -1)

    def gather_into(self, x: Tensor, out: Tensor) -> None:
        width = x.shape[1]
        for shard, part in enumerate(self._gathered(x)):
            place = out[:, shard * width : (shard + 1) * width]
            place.copy_(part[:, : place.shape[1]])

    def _gathered(self, x: Tensor) -> Tensor:
        """x on each rank → [size, *x.shape] on every rank."""
        parts = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        return parts

    def receive_into(self, x: Tensor) -> None:
        """Hidden states from the same shard of the stage before, in order with the current stream."""
        dist.recv(x, self.place.rank - self.layout.tp, group=self.way_in)

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        found = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return int(found.item())


@dataclass(frozen=True, slots=True)
class Unsummed:
    """y, of which every rank has a part, not yet added up: the norm behind it may do that in passing."""

    comm: DeviceCommunicator
    y: Tensor

    def value(self) -> Tensor:
        return self.comm.sum_(self.y)

    def added_and_normed(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inbox = self.comm.inbox
        if inbox is not None and not self.comm.ordered and inbox.norms(self.y) and x.dtype is self.y.dtype:
            return inbox.sum_add_norm(self.y, x, weight, eps)
        return self.comm.kernels.add_rms_norm(x, self.value(), weight, eps)

    def __mul__(self, factor: float) -> Tensor:
        return self.value() * factor

    def __radd__(self, x: Tensor) -> Tensor:
        return x + self.value()
