"""Which hosts an instance goes on, and how many instances there should be. Pure decisions: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from foretell.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the cluster, by the address that the others know it by."""

    address: str
    cpus: int
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """The ranks of an instance that one host has."""

    address: str
    ranks: tuple[int, ...]


def place(
    room: Mapping[str, int], held: Mapping[str, int], tp: int, pp: int, avoid: Collection[str] = ()
) -> list[Span]:
    """Where an instance of ``tp`` × ``pp`` ranks goes, by rank; [] if there is no place.

    ``room``: ranks that each host can take yet. ``held``: instances that have a part there; fewest first, so that a
    lost host costs as little as can be. One host if any has the room, for links within a host are the fastest; else
    as few as can be, and never with a stage on two hosts, for its ranks wait for each other in every layer. Hosts to
    ``avoid`` (lost of late, and perhaps not noticed yet) come last.
    """
    order = sorted(room, key=lambda a: (a in avoid, held.get(a, 0), -room[a], a))
    for address in order:
        if room[address] >= tp * pp:
            return [Span(address, tuple(range(tp * pp)))]
    spans, stage = [], 0
    for address in sorted(room, key=lambda a: (a in avoid, -(room[a] // tp), held.get(a, 0), a)):
        stages = min(room[address] // tp, pp - stage)
        if stages:
            spans.append(Span(address, tuple(range(stage * tp, (stage + stages) * tp))))
            stage += stages
    return spans if stage == pp else []


def place_all(hosts: Sequence[Host], instances: int, tp: int, pp: int, cpus_per_rank: int) -> list[list[Span]]:
    """All instances, one after the other; fewer than asked for if there is no place for more."""
    room, held = rooms(hosts, cpus_per_rank), dict.fromkeys((host.address for host in hosts), 0)
    found: list[list[Span]] = []
    while len(found) < instances and (spans := place(room, held, tp, pp)):
        for span in spans:
            room[span.address] -= len(span.ranks)
            held[span.address] += 1
        found.append(spans)
    return found


def rooms(hosts: Sequence[Host], cpus_per_rank: int) -> dict[str, int]:
    """How many ranks each empty host takes: one per GPU where it has some."""
    return {host.address: host.gpus or host.cpus // cpus_per_rank for host in hosts}


def most_cpus_per_rank(hosts: Sequence[Host], instances: int, tp: int, pp: int) -> int:
    """The most CPUs that every rank can have if all instances are to have a place. ConfigError if they have none."""
    for cpus in range(max((host.cpus for host in hosts), default=0), 0, -1):
        if len(place_all(hosts, instances, tp, pp, cpus)) == instances:
            return cpus
    fitting = len(place_all(hosts, instances, tp, pp, 1))
    raise ConfigError(
        f"{instances} × tp={tp} pp={pp} does not fit on {describe(hosts)}: {fitting} would; "
        "add hosts with ray start, or lower --replicas, --tp or --pp"
    )


def describe(hosts: Sequence[Host]) -> str:
    """The hosts in a few words."""
    each = [f"{host.address} ({_size(host)})" for host in hosts]
    return f"{len(hosts)} host{'s' * (len(hosts) != 1)}" + (f": {', '.join(each)}" if each else "")


def _size(host: Host) -> str:
    count, kind = (host.gpus, "GPU") if host.gpus else (host.cpus, "CPU")
    return f"{count} {kind}{'s' * (count != 1)}"


def where(spans: Sequence[Span]) -> str:
    """An instance's place in a few words."""
    return " + ".join(f"{s.address} ({len(s.ranks)} rank{'s' * (len(s.ranks) != 1)})" for s in spans)
