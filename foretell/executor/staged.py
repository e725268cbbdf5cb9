"""A pipeline in virtual time: each stage has its own clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from foretell.core.messages import Batch
from foretell.executor.virtual import VirtualExecutor

StageSeconds = Callable[[Batch], float]


class StagedExecutor(VirtualExecutor):
    """A batch enters a stage once the stage before has sent it on and this one has done its last. Tokens travel with
    the next batch, as in the parallel executor: nothing is chained."""

    def __init__(
        self,
        stages: Sequence[StageSeconds],
        num_blocks: tuple[int, ...],
        *,
        depth: int | None = None,
        output_lengths: Mapping[int, int] | None = None,
    ) -> None:
        """``depth``: batches in flight, as many as stages if not given."""
        super().__init__(stages[0], num_blocks, depth=depth or len(stages), chain=0, output_lengths=output_lengths)
        self.stages = list(stages)
        self._free_at = [0.0] * len(stages)

    def _schedule(self, batch: Batch) -> tuple[float, float]:
        at = max(self.now, self._free_at[0])
        started = at
        for stage, seconds in enumerate(self.stages):
            at = max(at, self._free_at[stage]) + seconds(batch)
            self._free_at[stage] = at
        self._busy_until = at
        return started, at
