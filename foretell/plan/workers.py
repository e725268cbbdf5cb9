"""Simulations on several cores: forked children that have everything the parent had, and send back plain JSON."""

from __future__ import annotations

import gc
import json
import os
import select
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType

from foretell.errors import ForetellError
from foretell.plan.evaluate import Outcome

Run = Callable[[int], Outcome | str]


@dataclass(slots=True)
class _Child:
    pid: int
    tasks: int  # file descriptors
    results: int
    index: int | None = None  # what it is at


class Workers:
    """``run(index)`` in ``processes`` children, or here where there is one process or no fork. A child never outlives
    the ``with``; one that dies is an error."""

    def __init__(self, run: Run, processes: int) -> None:
        self.run = run
        self._own: deque[int] = deque()
        self._children: list[_Child] = []
        if processes > 1 and hasattr(os, "fork"):
            self._children = [self._fork() for _ in range(processes)]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for child in self._children:
            os.close(child.tasks)  # the end of its work
            if error is not None:
                os.kill(child.pid, 9)
        for child in self._children:
            os.close(child.results)
            os.waitpid(child.pid, 0)

    @property
    def busy(self) -> bool:
        return bool(self._own) or any(child.index is not None for child in self._children)

    @property
    def is_full(self) -> bool:
        return bool(self._own) or (bool(self._children) and all(c.index is not None for c in self._children))

    def submit(self, index: int) -> None:
        """To a child that is idle."""
        for child in self._children:
            if child.index is None:
                child.index = index
                with suppress(BrokenPipeError):  # it has died: waiting for its result says so
                    os.write(child.tasks, f"{index}\n".encode())
                return
        self._own.append(index)

    def result(self) -> tuple[int, Outcome | str]:
        """Of whichever is done first."""
        if self._own:
            index = self._own.popleft()
            return index, self.run(index)
        at_work = {child.results: child for child in self._children if child.index is not None}
        ready, _, _ = select.select(list(at_work), [], [])
        child = at_work[ready[0]]
        done, child.index = child.index or 0, None
        return done, _read(child.results)

    def _fork(self) -> _Child:
        tasks_out, tasks_in = os.pipe()
        results_out, results_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for other in self._children:
                    os.close(other.tasks)
                    os.close(other.results)
                os.close(tasks_in)
                os.close(results_out)
                gc.freeze()
                gc.disable()  # a simulation makes many objects and hardly a cycle
                self._work(tasks_out, results_in)
                status = 0
            finally:
                os._exit(status)
        os.close(tasks_out)
        os.close(results_in)
        return _Child(pid, tasks_in, results_out)

    def _work(self, tasks: int, results: int) -> None:
        with os.fdopen(tasks, encoding="ascii") as lines, os.fdopen(results, "wb") as out:
            for line in lines:
                gc.collect()
                try:
                    found = self.run(int(line))
                    answer = {"reason": found} if isinstance(found, str) else {"outcome": asdict(found)}
                except Exception as error:  # the parent says it
                    answer = {"error": f"{type(error).__name__}: {error}"}
                data = json.dumps(answer).encode()
                out.write(len(data).to_bytes(8, "big") + data)
                out.flush()


def _read(results: int) -> Outcome | str:
    size = int.from_bytes(_exactly(results, 8), "big")
    answer = json.loads(_exactly(results, size))
    if "error" in answer:
        raise ForetellError(f"a simulation failed: {answer['error']}")
    return Outcome.from_dict(answer["outcome"]) if "outcome" in answer else str(answer["reason"])


def _exactly(results: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = os.read(results, size - len(data))
        if not part:
            raise ForetellError("a simulating process ended unexpectedly: it may have been killed for its memory")
        data += part
    return data
