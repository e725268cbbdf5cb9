"""What ranks say to each other: sums and gathers within a tensor-parallel group, hidden states between stages.

torch.distributed underneath: gloo between CPU processes, NCCL between GPUs.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

if TYPE_CHECKING:
    from foretell.model.residual import Pending
    from foretell.parallel.layout import Layout, Place


class Group(Protocol):
    """The tensor-parallel group of a rank."""

    size: int
    shard: int

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the group, in x or in a new tensor; on every rank the same bits."""
        ...

    def summed(self, x: Tensor) -> Tensor | Pending:
        """The same, or a note that it is to be done; x must not be written again."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[R, n] on each rank → [R, size · n] on every rank, shard by shard."""
        ...

    def gather_into(self, x: Tensor, out: Tensor) -> None:
        """The same, into ``out`` [R, N], what is beyond N left out."""
        ...


class Communicator:
    """The torch.distributed groups of one rank in a layout. ``timeout_seconds`` bounds every collective."""

    def __init__(
        self,
        layout: Layout,
        place: Place,
        store_url: str,
        *,
        backend: str,
        timeout_seconds: float,
        device: torch.device | None = None,
    ) -> None:
        seconds, store = timedelta(seconds=timeout_seconds), None
        if store_url.startswith("tcp://"):  # the driver's, of whichever host; files are of one host
            host, port = store_url.removeprefix("tcp://").rsplit(":", 1)
            store, store_url = TCPStore(host, int(port), is_master=False, timeout=seconds), ""
        dist.init_process_group(
            backend,
            init_method=store_url or None,
            store=store,
            rank=place.rank,
            world_size=layout.num_ranks,
            timeout=seconds,
            device_id=device,
        )
        self.layout, self.place = layout, place
        self.size, self.shard = layout.tp, place.shard
        groups = [  # every rank takes part in making every group
            dist.new_group([stage * layout.tp + shard for shard in range(layout.tp)]) for stage in range(layout.pp)
        ]
        self.group = groups[place.stage]
        # from the stage before and to the next; None: the group of all
        self.way_in: dist.ProcessGroup | None = None
        self.way_out: dist.ProcessGroup | None = None
        self._sending: list[tuple[dist.Work | None, Tensor]] = []

    def sum_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def summed(self, x: Tensor) -> Tensor | Pending:
        return self.sum_(x)

    def gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)

    def gather_into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self.gather(x)[:, : out.shape[1]])

    def send_on(self, x: Tensor) -> None:
        """Hidden states to the same shard of the next stage; returns at once, ``x`` must not be written again."""
        self._sending = [(work, kept) for work, kept in self._sending if work is not None and not work.is_completed()]
        self._sending.append((dist.isend(x.contiguous(), self.place.rank + self.layout.tp, group=self.way_out), x))

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Hidden states from the same shard of the stage before."""
        x = torch.empty(shape, dtype=dtype)
        dist.recv(x, self.place.rank - self.layout.tp, group=self.way_in)
        return x

    def preflight(self) -> None:
        """One collective of all ranks: raises when one does not answer in time."""
        dist.barrier()

    def close(self) -> None:
        dist.destroy_process_group()
