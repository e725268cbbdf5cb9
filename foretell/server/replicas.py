"""Several engines behind one TextEngine: requests go where their beginning is cached, unless that one is too busy."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.assembly import EngineOptions
from foretell.cpus import usable_cpus
from foretell.errors import ConfigError, InvalidRequestError, OverloadedError, UnavailableError
from foretell.memory import default_kv_bytes
from foretell.routing import Beginnings, pieces_of, preference
from foretell.server.engine_client import COUNTERS, EngineClient
from foretell.server.supervisor import ENGINE_COMMAND, Watch
from foretell.server.text_engine import EngineAbout
from foretell.tracking import Update

if TYPE_CHECKING:
    from foretell.core.params import SamplingParams
    from foretell.prompts import Prompt, PromptPreparer
    from foretell.server import wire
    from foretell.store import Tokenizer

SUMMED = ("running", "waiting", "requests", "kv_blocks", "kv_blocks_held", "unfinished", "restarts", "steps",
          "prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits")  # fmt: skip


@dataclass(eq=False, slots=True)
class Member:
    """One engine of a set, and what the set knows of it."""

    client: EngineClient
    beginnings: Beginnings = field(default_factory=Beginnings)
    restarts: int = 0
    unfinished: int = 0

    def forget_if_restarted(self) -> None:
        """A new engine process begins with an empty cache."""
        restarts = self.client.supervisor.restarts
        if restarts != self.restarts:
            self.restarts = restarts
            self.beginnings.clear()


class ReplicaSet:
    """A ``TextEngine`` of equal engines. One that dies is restarted by its own supervisor; requests that had no
    answer yet are tried on another."""

    about: EngineAbout
    preparer: PromptPreparer
    ready: wire.Ready

    def __init__(self, replicas: Sequence[EngineClient]) -> None:
        self.members = [Member(replica) for replica in replicas]
        self._turn = count()
        self._departed: Counter[str] = Counter()  # what replicas counted that are here no more
        self._departed_preemptions: Counter[str] = Counter()

    @property
    def replicas(self) -> list[EngineClient]:
        return [member.client for member in self.members]

    # -- life ---------------------------------------------------------------------------------------

    async def start(self, on_phase: Callable[[str, float], None] = lambda name, seconds: None) -> None:
        """All at once; the phases that are told are the first one's. The first error ends them all."""
        silent: Callable[[str, float], None] = lambda name, seconds: None  # noqa: E731
        starts = [asyncio.create_task(r.start(silent if i else on_phase)) for i, r in enumerate(self.replicas)]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        first = self.replicas[0]
        self.about, self.preparer, self.ready = first.about, first.preparer, first.ready

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.replicas[0].tokenizer

    def drain(self) -> None:
        for replica in self.replicas:
            replica.drain()

    def end_all(self, reason: str) -> None:
        for replica in self.replicas:
            replica.end_all(reason)

    async def close(self, grace_seconds: float = 5.0) -> None:
        await asyncio.gather(*(replica.close(grace_seconds) for replica in self.replicas))

    # -- requests -----------------------------------------------------------------------------------

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.replicas[0].check(prompt_token_ids, params)

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[Update]:
        """See ``TextEngine``. A replica that refuses, or dies before it said anything, is passed over."""
        pieces = pieces_of(prompt)
        refusals: list[OverloadedError | UnavailableError] = []
        for member in self.best(pieces):
            begun = False
            member.unfinished += params.n
            try:
                updates = member.client.stream(prompt, params, priority=priority, timeout_seconds=timeout_seconds)
                async with aclosing(updates):  # type: ignore[type-var]  # an async generator, whatever its type says
                    async for update in updates:
                        if not begun:
                            member.beginnings.note(pieces)
                        begun = True
                        yield update
                return
            except (OverloadedError, UnavailableError) as error:
                if begun:
                    raise
                refusals.append(error)
            finally:
                member.unfinished -= params.n
        raise next((e for e in refusals if isinstance(e, OverloadedError)), refusals[0])

    def best(self, pieces: Sequence[bytes]) -> list[Member]:
        """The replicas to try, best first: the longest cached beginning among those that are not far busier than
        the idlest; then the idlest; in turn where all is equal."""
        members = self.members
        for member in members:
            member.forget_if_restarted()
        order = preference(
            [member.unfinished for member in members],
            lambda i: members[i].beginnings.matching(pieces),
            next(self._turn),
        )
        # stable: those that run, first
        return sorted((members[index] for index in order), key=lambda member: not member.client.is_running)

    def remove(self, member: Member) -> None:
        """It gets no more requests, and what it has counted until now stays in the sums."""
        self.members = [other for other in self.members if other is not member]
        stats = member.client.stats()
        for name in (*COUNTERS, "restarts"):
            self._departed[name] += stats.get(name, 0)
        self._departed_preemptions.update(stats.get("preemptions", {}))

    # -- administration -----------------------------------------------------------------------------

    async def control(self, command: str, **arguments: Any) -> Any:
        """On every replica that runs, and of a policy on those that will again; the first one's answer, or all of
        their lists as one."""
        running = [replica for replica in self.replicas if replica.is_running]
        if not running:
            raise UnavailableError("no replica is running: try again in a few seconds")
        answers = await asyncio.gather(*(r.control(command, **arguments) for r in running), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, InvalidRequestError):
                raise answer
        found = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not found:
            raise UnavailableError("no replica answered: try again in a few seconds")
        if command == "set_policy":
            for replica in self.replicas:
                replica.start_with(policy=found[0]["policy"])
        return [record for records in found for record in records] if isinstance(found[0], list) else found[0]

    def stats(self) -> Mapping[str, Any]:
        """Sums over the replicas; ``kv_usage`` is the mean; ``replicas`` has each one's own."""
        each = [replica.stats() for replica in self.replicas]
        preemptions = dict(self._departed_preemptions)
        for stats in each:
            for reason, number in stats.get("preemptions", {}).items():
                preemptions[reason] = preemptions.get(reason, 0) + number
        return {
            **each[0],
            **{name: sum(stats.get(name, 0) for stats in each) + self._departed[name] for name in SUMMED},
            "kv_usage": sum(stats.get("kv_usage", 0.0) for stats in each) / len(each),
            "preemptions": preemptions,
            "replicas": each,
        }

    @property
    def is_running(self) -> bool:
        return any(replica.is_running for replica in self.replicas)

    @property
    def is_ready(self) -> bool:
        return any(replica.is_ready for replica in self.replicas)

    @property
    def is_healthy(self) -> bool:
        """All are: one that hangs must be seen."""
        return all(replica.is_healthy for replica in self.replicas)


def make_replicas(options: EngineOptions, count: int, *, max_queue: int, watch: Watch | None) -> ReplicaSet:
    """Equal engines that share this machine: threads and KV memory in equal parts, or a GPU for each rank.
    ConfigError if there are GPUs, but too few."""
    devices, ranks = visible_gpus() if options.device != "cpu" else [], options.tp * options.pp
    if devices and count * ranks > len(devices):
        raise ConfigError(
            f"{count} replicas need {ranks} GPU{'s' * (ranks > 1)} each and {len(devices)} are here: lower "
            "--replicas, tp or pp, or use --device cpu"
        )
    if not devices:
        options = replace(
            options,
            num_threads=max(1, (options.num_threads or usable_cpus()) // count),
            kv_cache_bytes=max(1, (options.kv_cache_bytes or default_kv_bytes()) // count),
        )
    replicas = []
    for index in range(count):
        own = devices[index * ranks : (index + 1) * ranks]
        place = ["env", f"CUDA_VISIBLE_DEVICES={','.join(own)}"] if devices else []
        command = [*place, *ENGINE_COMMAND]
        replicas.append(EngineClient(options, max_queue=-(-max_queue // count), watch=watch, command=command))
    return ReplicaSet(replicas)


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that a process started here may use, as CUDA_VISIBLE_DEVICES names them; nothing is loaded."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
