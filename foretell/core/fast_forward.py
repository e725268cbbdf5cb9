"""The engine loop in virtual time with decodes in lockstep: steps of the group alone are taken many at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

from foretell.config import SchedulerConfig
from foretell.core.ahead import closed_turns
from foretell.core.engine import Engine
from foretell.core.group import GroupBatch, Together
from foretell.core.lockstep import LockstepScheduler, Voice
from foretell.core.messages import Turn
from foretell.executor.base import Executor


class Clock(Executor, Voice, Protocol):
    """A virtual executor whose clock can be moved on."""

    @property
    def ready_at(self) -> float:
        """When all that was submitted will be done, in seconds; not before now."""
        ...

    def decode_seconds(self, sequences: int, kv_tokens: int) -> Iterator[float]:
        """Of consecutive steps of one token for each of the sequences, with so many keys together in the first."""
        ...

    def decoded(self, sequences: int, steps: int, seconds: float) -> None:
        """So many such steps were taken and took so long together."""
        ...

    def jump(self, now: float, flying: tuple[int, float] | None) -> None:
        """To this time; (id, end) of the batch that is in flight then, without results of single requests."""
        ...


class FastEngine(Engine):
    """Serves requests whose lengths are known: no stop tokens, no grammars, no sliding windows."""

    scheduler: LockstepScheduler

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Clock,
        windows: Iterable[int | None] = (None,),
        *,
        scheduler: type[LockstepScheduler] = LockstepScheduler,
    ) -> None:
        super().__init__(config, clock, windows, scheduler=scheduler)
        self.clock = clock
        self.scheduler.voice = clock

    def fast_forward(self, until: float | None = None) -> list[tuple[int, float]] | None:
        """Take the steps in which only the group decodes and nobody is let in, as far as they end by ``until``:
        whom they ended, and when. None if the next step is not such a one."""
        scheduler, flying = self.scheduler, next(iter(self._in_flight.values()), None)
        if len(self._in_flight) != scheduler.depth - 1 or scheduler.waiting.num_aside:
            return None
        part = None
        if flying is not None:
            part = flying.batch.together if isinstance(flying.batch, GroupBatch) else None
            if part is None or flying.batch.chunks:
                return None
        scheduler.gather()
        if not 0 < len(scheduler.group.members) <= scheduler.config.max_num_batched_tokens:
            return None
        turns = scheduler.quiet_turns()
        if turns <= 0 or (turns := min(turns, closed_turns(scheduler))) <= 0:
            return None
        first = scheduler.turn
        ended = self._stretch(part, turns, math.inf if until is None else until)
        return ended if scheduler.turn > first else None

    def _stretch(self, flying: Together | None, turns: int, limit: float) -> list[tuple[int, float]]:
        """``flying``: the step in flight, with two of them. A turn plans a step and takes back that one or itself."""
        scheduler, clock = self.scheduler, self.clock
        ended: list[tuple[int, float]] = []
        now = end = clock.ready_at
        count, steps, began = 0, 0, now
        seconds: Iterator[float] = iter(())
        first = scheduler.turn
        while scheduler.turn - first < turns and scheduler.group.members:
            if flying is not None and end > limit:
                break
            if len(scheduler.group.members) != count:
                clock.decoded(count, steps, end - began)
                count, steps, began = len(scheduler.group.members), 0, end
                seconds = clock.decode_seconds(count, scheduler.group.kv_tokens)
            after = end + next(seconds)
            if flying is None and after > limit:
                break
            part = scheduler.step_alone()
            if part is None:
                break
            if scheduler.turn == first + 1:
                scheduler.admission.skip_turns(scheduler.turn)
            steps += 1
            back, now, end = (part, after, after) if flying is None else (flying, end, after)
            if flying is not None:
                flying = part
            outputs = scheduler.take_back(back)
            ended += [(output.request_id, now) for output in outputs]
            if outputs and scheduler.waiting:
                break
        clock.decoded(count, steps, end - began)
        self._land(flying, now, end, scheduler.turn > first)
        return ended

    def _land(self, flying: Together | None, now: float, end: float, moved: bool) -> None:
        if not moved:
            return
        if flying is None:
            self.clock.jump(now, None)
            return
        batch = GroupBatch(self.scheduler.num_batches - 1, [], together=flying)
        self._in_flight = {batch.id: Turn(self.scheduler.turn, batch)}
        self.scheduler.replace_in_flight(batch)
        self.clock.jump(now, (batch.id, end))
