"""Who does what when while a model is loaded onto a GPU: every call that matters, timed."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from foretell.kernels.cuda import CudaKernels
from foretell.model import lanes
from foretell.model import load as model_load
from foretell.model.build import Builder
from foretell.model.carriers import Carriers
from foretell.model.device_weights import DeviceFileWeights

TIMED: tuple[tuple[Any, str, str], ...] = (
    (model_load, "open_tensors", "open"), (DeviceFileWeights, "__init__", "names"),
    (DeviceFileWeights, "start", "announce"), (Builder, "build", "build"), (DeviceFileWeights, "check", "check"),
    (DeviceFileWeights, "close", "close"),
    (Carriers, "_next_crate", "room"), (Carriers, "_begin", "make"),
    (torch, "empty", "allocate"), (torch.cuda.Stream, "synchronize", "device"),
    (lanes, "lane_to", "ready"), (lanes, "read", "read"), (torch.Tensor, "copy_", "copy"),
    (Carriers, "_arrived", "tell"),
    (Carriers, "take", "take"), (torch.Tensor, "sum", "sum"), (torch.Tensor, "to", "to"),
    (torch.Tensor, "clone", "clone"), (CudaKernels, "pack_linear", "pack"),
)  # fmt: skip


class Span(NamedTuple):
    """A call."""

    begin: float
    end: float
    thread: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


Spans = dict[str, list[Span]]


@contextmanager
def watched() -> Iterator[Spans]:
    """The calls until it ends, by name, in the order in which they end; and what Python's collector takes."""
    spans: Spans = {name: [] for name in ("pin", "collect", *(name for _, _, name in TIMED))}
    collecting = [0.0]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                found = spans["pin" if options.get("pin_memory") else name]
                found.append(Span(begin, time.perf_counter(), threading.get_ident()))

        return call

    def collected(phase: str, info: dict[str, int]) -> None:
        now = time.perf_counter()
        if phase == "stop":
            spans["collect"].append(Span(collecting[0], now, threading.get_ident()))
        collecting[0] = now

    gc.callbacks.append(collected)
    before = [getattr(owner, attribute) for owner, attribute, _ in TIMED]
    for (owner, attribute, name), function in zip(TIMED, before, strict=True):
        setattr(owner, attribute, timed(name, function))
    try:
        yield spans
    finally:
        gc.callbacks.remove(collected)
        for (owner, attribute, _), function in zip(TIMED, before, strict=True):
            setattr(owner, attribute, function)


def total(spans: Sequence[Span]) -> float:
    return sum(span.seconds for span in spans)


def moments(spans: Spans, started: float) -> dict[str, float]:
    """Milliseconds from the start until things were so, in order."""
    ready, tell = [span.end for span in spans["ready"]], [span.begin for span in spans["tell"]]
    found = {
        "files open": spans["open"][0].end, "names known": spans["names"][0].end,
        "announced": spans["announce"][0].end, "first tensor made": min(span.end for span in spans["make"]),
        "a carrier ready": min(ready), "all ready": max(ready), "first piece": min(tell), "last piece": max(tell),
        "built": spans["build"][0].end, "checked": spans["check"][-1].end, "closed": spans["close"][0].end,
    }  # fmt: skip
    return {name: (at - started) * 1e3 for name, at in sorted(found.items(), key=lambda item: item[1])}


def of_a_carrier(spans: Spans, started: float, ended: float) -> dict[str, float]:
    """What the time went to, in milliseconds, the mean of those that carried anything."""
    own: dict[int, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for name in ("ready", "pin", "read", "copy", "tell"):
        for span in spans[name]:
            own[span.thread][name].append(span)
    rows = []
    for calls in own.values():
        if not calls["ready"] or not calls["read"]:
            continue
        ready, pinning, first, last = calls["ready"][0], total(calls["pin"]), calls["read"][0], calls["tell"][-1]
        parts = {name: total(calls[name]) for name in ("read", "copy", "tell")}
        rows.append({
            "not there": ready.begin - started, "stream": ready.seconds - pinning, "pinning": pinning,
            "waiting for the first piece": first.begin - ready.end, "reading": parts["read"],
            "copying": parts["copy"], "telling": parts["tell"],
            "waiting between": last.end - first.begin - sum(parts.values()), "after the last": ended - last.end,
        })  # fmt: skip
    return {name: statistics.fmean(row[name] for row in rows) * 1e3 for name in rows[0]}


def of_the_planner(spans: Spans) -> dict[str, float]:
    """Milliseconds."""
    thread = spans["make"][0].thread
    allocated = [span for span in spans["allocate"] if span.thread == thread]
    device = [span for span in spans["device"] if span.thread == thread]
    parts = {
        "allocating": total(allocated), "slowest allocation": max(span.seconds for span in allocated),
        "waiting for the device": total(device),
        "cutting": total(spans["make"]) - total(allocated) - total(device), "waiting for room": total(spans["room"]),
    }  # fmt: skip
    return {name: seconds * 1e3 for name, seconds in parts.items()}


def slowest(spans: Sequence[Span], started: float) -> str:
    if not spans:
        return "nothing"
    last = max(spans, key=lambda span: span.seconds)
    at = (last.begin - started) * 1e3
    return f"{total(spans) * 1e3:.0f} ms in {len(spans)}, slowest {last.seconds * 1e3:.1f} at {at:.0f}"


def first_and_others(spans: Sequence[Span], started: float) -> str:
    """How long a call takes, and the first one of every thread."""
    first: dict[int, Span] = {}
    for span in spans:
        first.setdefault(span.thread, span)
    others = [span.seconds for span in spans if first[span.thread] is not span] or [0.0]
    firsts = [span.seconds * 1e3 for span in first.values()]
    return (
        f"{statistics.median(others) * 1e3:.2f} ms (a thread's first {statistics.fmean(firsts):.2f}, "
        f"{max(firsts):.2f} at most; {slowest(spans, started).partition(', ')[2]})"
    )


def lines(spans: Spans, started: float, ended: float) -> list[str]:
    """All of it, for people; milliseconds."""

    def listed(parts: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.0f}" for name, value in parts.items())

    carriers, planner = {span.thread for span in spans["ready"]}, spans["make"][0].thread
    copies = [span for span in spans["copy"] if span.thread in carriers]
    builder = {
        name: [span for span in spans[name] if span.thread not in carriers and span.thread != planner]
        for name in ("take", "sum", "to", "clone", "pack")
    }
    return [
        f"moments: {listed(moments(spans, started))}",
        f"a carrier of {len(carriers)}: {listed(of_a_carrier(spans, started, ended))}",
        f"a read {first_and_others(spans['read'], started)}, a copy {first_and_others(copies, started)}",
        f"planner, {len(spans['make'])} pieces of memory: {listed(of_the_planner(spans))}",
        "builder: " + "; ".join(f"{name} {slowest(each, started)}" for name, each in builder.items()),
        f"collector: {slowest(spans['collect'], started)}",
    ]
