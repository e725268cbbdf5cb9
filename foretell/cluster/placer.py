"""The placer: the one process that speaks with Ray. It reserves places, starts slots in them, and gives them back.

Started by the server as ``python -m foretell.cluster.placer ADDRESS FD``. Ray ends a process whose cluster is lost;
were it the server's own, its clients would hear nothing. The slots end with the placer, and it with the server.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import msgspec

from foretell.children import die_with_parent
from foretell.cluster.messages import EndInstance, ListHosts, Reply, Started, StartInstance, ToPlacer
from foretell.cluster.place import Host
from foretell.cluster.slot import Slot
from foretell.errors import ConfigError, ForetellError, UnavailableError

RESERVE_SECONDS = 15.0
START_SECONDS = 60.0
LOOPBACK = "127.0.0.2"  # Ray takes 127.0.0.1 for a wish to find out this host's address
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # the least that Ray takes: nothing of ours goes through it


class Placer:
    """Instances by name: their placement groups and slots."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._held: dict[str, tuple[Any, list[Any]]] = {}
        self._ended: set[str] = set()
        self._lock = threading.Lock()

    def hosts(self) -> list[Host]:
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        return [
            Host(n["NodeManagerAddress"], int(n["Resources"].get("CPU", 0)), int(n["Resources"].get("GPU", 0)))
            for n in sorted(alive, key=lambda n: str(n["NodeManagerAddress"]))
        ]

    def start(self, job: StartInstance) -> Started:
        from ray.exceptions import RayError

        try:
            return self._start(job)
        except RayError as error:
            self.end(job.name)
            text = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UnavailableError(f"an instance could not be started: {text}") from None
        except BaseException:
            self.end(job.name)
            raise

    def _start(self, job: StartInstance) -> Started:
        ray = self._ray
        slots = self._reserve(job)
        facts = ray.get([slot.facts.remote() for slot in slots], timeout=START_SECONDS)
        addresses = [span.address for span in job.spans]
        for name in ("foretell", "python"):
            if len({fact[name] for fact in facts}) > 1:
                each = ", ".join(f"{a}: {fact[name]}" for a, fact in zip(addresses, facts, strict=True))
                raise ConfigError(f"the hosts have different versions of {name} ({each}): install the same")
        ranks = None
        if sum(len(span.ranks) for span in job.spans) > 1:
            hosts = [span.address for span in job.spans for _ in span.ranks]
            free = sum(fact["free_bytes"] for fact in facts)
            ranks = {"secret": job.rank_secret, "hosts": hosts, "memory_bytes": free}
        dialling = {"address": job.address, "port": job.port, "name": job.name, "secret": job.secret}
        pid, port = ray.get(slots[0].start_engine.remote(dialling, ranks), timeout=START_SECONDS)
        if ranks is not None:
            meeting = {"address": addresses[0], "port": port, "secret": job.rank_secret}
            started = [
                slot.start_rank.remote({**meeting, "name": f"rank {rank}"})
                for slot, span in zip(slots, job.spans, strict=True)
                for rank in span.ranks
            ]
            ray.get(started, timeout=START_SECONDS)
        return Started(pid, {a: fact["free_bytes"] for a, fact in zip(addresses, facts, strict=True)})

    def _reserve(self, job: StartInstance) -> list[Any]:
        """A slot on each host of the instance; all or nothing."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kind, per_rank = ("GPU", 1) if job.gpus else ("CPU", job.cpus_per_rank)
        bundles = [{kind: len(span.ranks) * per_rank, f"node:{span.address}": 0.001} for span in job.spans]
        group = placement_group(bundles, strategy="PACK" if len(bundles) == 1 else "STRICT_SPREAD", name=job.name)
        with self._lock:
            self._held[job.name] = (group, [])
        if not group.wait(RESERVE_SECONDS):
            where = ", ".join(span.address for span in job.spans)
            raise UnavailableError(
                f"{where} had no room within {RESERVE_SECONDS:.0f} s: others hold it, or it is lost"
            )
        actor = self._ray.remote(Slot)
        slots = []
        for index, (span, bundle) in enumerate(zip(job.spans, bundles, strict=True)):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            slots.append(
                actor.options(
                    num_cpus=0 if job.gpus else bundle["CPU"],
                    num_gpus=bundle["GPU"] if job.gpus else 0,
                    scheduling_strategy=strategy,
                    max_restarts=0,
                ).remote(span.address)
            )
        with self._lock:
            if job.name in self._ended:
                raise UnavailableError("the instance was ended while it started")
            self._held[job.name] = (group, slots)
        return slots

    def end(self, name: str) -> None:
        from ray.util.placement_group import remove_placement_group

        with self._lock:
            self._ended.add(name)
            group, slots = self._held.pop(name, (None, []))
        for slot in slots:
            with suppress(Exception):  # its host may be lost: then it has ended
                self._ray.kill(slot)
        if group is not None:
            with suppress(Exception):
                remove_placement_group(group)


def connect(address: str) -> tuple[Any, str]:
    """Ray, joined to a cluster, and this host's address in it. ForetellError in one line if it cannot be."""
    if address == "local":  # some of Ray's ports are open to all addresses even so: not without this
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
    except ImportError:
        raise ConfigError("--cluster needs Ray: pip install 'foretell[cluster]'") from None
    local: dict[str, Any] = {}
    if address == "local":
        local = {"_node_ip_address": LOOPBACK, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address,
            include_dashboard=False if local else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            **local,
        )
        return ray, str(ray.util.get_node_ip_address())
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"no Ray cluster at {address}: {text}: run ray start on this host first, or give --cluster local"
        ) from None


def serve(address: str, sock: socket.socket) -> int:
    lock = threading.Lock()

    def say(message: Any) -> None:
        with lock, suppress(OSError):
            sock.sendall(msgspec.json.encode(message) + b"\n")

    try:
        ray, own = connect(address)
    except ForetellError as error:
        say(Reply(0, error=str(error), user_error=True))
        return 1
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # the server drains first, then this ends with it
        signal.signal(interrupt, signal.SIG_IGN)
    placer, decode = Placer(ray), msgspec.json.Decoder(ToPlacer).decode

    def answer(message: ListHosts | StartInstance) -> None:
        try:
            value: Any = placer.start(message) if isinstance(message, StartInstance) else placer.hosts()
            say(Reply(message.call, value))
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            say(Reply(message.call, error=text, user_error=isinstance(error, ConfigError)))

    say(Reply(0, own))
    with sock.makefile("rb") as lines, ThreadPoolExecutor(32) as pool:
        while line := lines.readline():
            message = decode(line)
            if isinstance(message, EndInstance):
                pool.submit(placer.end, message.name)
            else:
                pool.submit(answer, message)
    ray.shutdown()  # the server is gone: its slots end, and with "local" the whole cluster
    return 0


if __name__ == "__main__":
    die_with_parent()
    os.dup2(2, 1)  # what slots print is for the log
    sys.exit(serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2]))))
