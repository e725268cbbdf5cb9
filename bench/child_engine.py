"""An engine in a child process, timed there: thread pools of two engines in one process slow each other down."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretell.trace import Workload


@dataclass(frozen=True)
class Sample:
    """``others``: the share of the machine that other processes used meanwhile."""

    seconds: float
    others: float


def machine_busy_seconds() -> float:
    """CPU seconds of all processes so far; 0 where that is not told."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for disks


def serve(pipe: Any, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """In the child: build the engine, then do what is asked, with the time it took."""
    warnings.simplefilter("ignore")
    engine = make(*arguments)
    while (asked := pipe.recv()) is not None:
        name, parameters = asked
        started, busy, own = time.perf_counter(), machine_busy_seconds(), time.process_time()
        answer = getattr(engine, name)(*parameters)
        seconds = time.perf_counter() - started
        others = machine_busy_seconds() - busy - (time.process_time() - own)
        pipe.send((answer, Sample(seconds, max(0.0, others / (seconds * (os.cpu_count() or 1))))))


class Engine:
    """An engine in a child process, called as if it were here."""

    def __init__(self, name: str, make: Callable[..., Any], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, make, arguments), daemon=True)
        self.process.start()
        other.close()

    def call(self, method: str, *parameters: Any) -> Any:
        return self._ask(method, parameters)[0]

    def sample(self, workload: Workload, limit: int | None = None) -> Sample:
        return self._ask("run", (workload, limit))[1]

    def _ask(self, method: str, parameters: tuple[Any, ...]) -> tuple[Any, Sample]:
        self.pipe.send((method, parameters))
        try:
            answer, sample = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name} died; its error stands above") from None
        return answer, sample

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(10)
