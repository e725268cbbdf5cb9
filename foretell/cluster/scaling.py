"""How many replicas the queue asks for. Pure: time and load come in, a number goes out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """Bounds, and how long a need must last. Outputs wait when they are more than ``running_per_replica`` each."""

    least: int
    most: int
    running_per_replica: int  # outputs that one replica works on at once
    up_seconds: float = 10.0  # a queue that lasts so long brings one replica more
    down_seconds: float = 120.0  # a load that so long would fit with room to spare on one less takes it away
    spare: float = 0.5  # of the running places of those that would be left


@dataclass(slots=True)
class Scaler:
    """Remembers since when there has been a need."""

    policy: ScalingPolicy
    _since: float | None = field(default=None, init=False)
    _direction: int = field(default=0, init=False)

    def wanted(self, now: float, replicas: int, unfinished: int) -> int:
        """The number of replicas to have from now on. ``unfinished``: outputs that run or wait, on all of them."""
        policy = self.policy
        if not policy.least <= replicas <= policy.most:
            return min(max(replicas, policy.least), policy.most)
        direction = self._need(replicas, unfinished)
        if direction != self._direction or self._since is None:
            self._direction, self._since = direction, now
        patience = policy.up_seconds if direction > 0 else policy.down_seconds
        if direction == 0 or now - self._since < patience:
            return replicas
        self._since = None  # one at a time: what it brings must show first
        return replicas + direction

    def _need(self, replicas: int, unfinished: int) -> int:
        places = self.policy.running_per_replica
        if unfinished > replicas * places and replicas < self.policy.most:
            return 1
        if replicas > self.policy.least and unfinished <= (replicas - 1) * places * (1 - self.policy.spare):
            return -1
        return 0
