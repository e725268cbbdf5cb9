"""Replicas on the hosts of a cluster: as many as the queue asks for, within bounds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foretell.cluster.link import Cluster, Launcher, Shape
from foretell.cluster.place import most_cpus_per_rank, where
from foretell.cluster.scaling import Scaler, ScalingPolicy
from foretell.errors import ConfigError, ForetellError
from foretell.server.engine_client import EngineClient
from foretell.server.replicas import Member, ReplicaSet
from foretell.server.supervisor import Watch

if TYPE_CHECKING:
    from foretell.assembly import EngineOptions

log = logging.getLogger("foretell.cluster")
LOOK_SECONDS = 1.0  # between two looks at the queue
LONGEST_PAUSE_SECONDS = 5.0  # before a lost instance is placed again: its host may be back


class ClusterReplicas(ReplicaSet):
    """A ``ReplicaSet`` whose engines are wherever there is room, and whose number follows the load."""

    def __init__(
        self,
        options: EngineOptions,
        address: str,
        *,
        least: int,
        most: int,
        max_queue: int,
        watch: Watch | None = None,
        up_seconds: float = 10.0,
        down_seconds: float = 120.0,
    ) -> None:
        """ConfigError for bounds that are none."""
        if not 1 <= least <= most:
            raise ConfigError(f"--replicas {least} and --max-replicas {most}: the second is the larger one")
        super().__init__([])
        self.cluster = Cluster(address)
        self._options = options
        self._bounds, self._seconds = (least, most), (up_seconds, down_seconds)
        self._max_queue = -(-max_queue // least)
        self._watch = replace(watch or Watch(), longest_pause_seconds=LONGEST_PAUSE_SECONDS)
        self._launcher: Launcher | None = None
        self._scaling: asyncio.Task[None] | None = None
        self._leaving: set[asyncio.Task[None]] = set()

    async def start(self, on_phase: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """The least number of replicas; ForetellError, and nothing left running, if they cannot all be."""
        options, (least, most) = self._options, self._bounds
        try:
            hosts = await self.cluster.hosts()
            ranks = options.tp * options.pp
            if options.num_threads is not None:
                cpus = max(1, options.num_threads // ranks)
            else:
                cpus = most_cpus_per_rank(hosts, least, options.tp, options.pp)
                if most > least:  # room to grow into, where there is some
                    cpus = next((c for c in (_fitting(hosts, most, options), 1) if c), cpus)
            shape = Shape(options.tp, options.pp, cpus, options.kv_cache_bytes)
            self._launcher = Launcher(self.cluster, shape)
            self.members = [self._member() for _ in range(least)]
            await super().start(on_phase)
        except BaseException:
            await self.cluster.close()
            raise
        for spans in self._launcher.placed.values():
            log.info("an instance is on %s", where(spans))
        policy = ScalingPolicy(least, most, self.ready.max_num_seqs, *self._seconds)
        if most > least:
            self._scaling = asyncio.create_task(self._scale(Scaler(policy)))

    def _member(self) -> Member:
        if self._launcher is None:
            raise ForetellError("the cluster has not been started")
        return Member(
            EngineClient(self._options, max_queue=self._max_queue, watch=self._watch, launch=self._launcher.launch)
        )

    async def close(self, grace_seconds: float = 5.0) -> None:
        tasks = [task for task in (self._scaling, *self._leaving) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().close(grace_seconds)
        await self.cluster.close()

    # -- as many as are needed ------------------------------------------------------------------------

    async def _scale(self, scaler: Scaler) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            unfinished = sum(member.unfinished for member in self.members)
            wanted = scaler.wanted(loop.time(), len(self.members), unfinished)
            if wanted > len(self.members):
                await self._grow(unfinished)
            elif wanted < len(self.members):
                self._shrink()

    async def _grow(self, unfinished: int) -> None:
        member = self._member()
        try:
            await member.client.start()
        except (ForetellError, OSError) as error:
            log.warning("%d outputs are unfinished, and another replica cannot be started: %s", unfinished, error)
            await member.client.close(0.0)
        except BaseException:
            await member.client.close(0.0)
            raise
        else:
            self.members = [*self.members, member]
            host = member.client.supervisor.host
            log.info("%d outputs are unfinished: %d replicas, the new one on %s", unfinished, len(self.members), host)

    def _shrink(self) -> None:
        """The idlest one takes no more requests, and ends with those it has."""
        leaving = min(self.members, key=lambda member: (member.client.is_running, member.unfinished))
        self.remove(leaving)
        log.info("the load fits on fewer: %d replicas", len(self.members))
        task = asyncio.create_task(self._leave(leaving))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, member: Member) -> None:
        try:
            while member.unfinished:
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await member.client.close()

    # -- what it tells of itself ------------------------------------------------------------------------

    def stats(self) -> Mapping[str, Any]:
        least, most = self._bounds
        return {**super().stats(), "replicas_least": least, "replicas_most": most}

    @property
    def is_healthy(self) -> bool:
        """Those that run are; one whose host is lost waits for another, and the others serve meanwhile."""
        running = [replica for replica in self.replicas if replica.is_running]
        return bool(running) and all(replica.is_healthy for replica in running)


def _fitting(hosts: Any, instances: int, options: EngineOptions) -> int:
    """CPUs per rank with which so many instances fit; 0 if they never do."""
    try:
        return most_cpus_per_rank(hosts, instances, options.tp, options.pp)
    except ConfigError:
        return 0
