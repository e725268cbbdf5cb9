"""One rank: a process that holds its share of the model and computes its part of every batch.

Started by ``ParallelExecutor``; the last argument is the number of its end of a socket pair. Or by a slot on some
host of a cluster: then it is "dial", and the environment says where.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from foretell.children import die_with_parent
from foretell.core.params import SamplingParams
from foretell.errors import OverloadedError
from foretell.executor.prepare import prepare_grammar
from foretell.parallel.loading import Loading
from foretell.parallel.messages import (
    Beat,
    Channel,
    Done,
    Failed,
    Prepare,
    Prepared,
    Ready,
    Setup,
    Step,
    Stop,
    ToRank,
)

if TYPE_CHECKING:
    from foretell.core.messages import ChunkResult
    from foretell.parallel.device_stage import DeviceStage
    from foretell.parallel.stage import StageRunner

    Runner = StageRunner | DeviceStage

BEAT_SECONDS = 0.5


class Heart:
    """Tells the driver twice a second that this process lives and what it is at; ends it when the driver is gone."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.phase = "starting"
        threading.Thread(target=self._beat, name="foretell-heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self.channel.send(Beat(self.phase))
            except OSError:
                os._exit(1)  # the main thread may be caught in a collective
            time.sleep(BEAT_SECONDS)


def main(fd: int | None, *, tied: bool) -> int:
    """``tied``: the driver's death ends this process at once, not only when its heart finds nobody listening."""
    if tied:
        die_with_parent()
    channel = Channel(dialled() if fd is None else socket.socket(fileno=fd), ToRank)
    heart = Heart(channel)
    try:
        setup = channel.receive()
        runner, ready = load(setup, heart)
        channel.send(ready)
        serve(channel, runner, heart)
        if runner.ahead:
            os._exit(0)  # what GPUs say to each other is not taken down: that may wait for others who have left
    except EOFError:
        return 1
    except Exception as error:
        say_failed(channel, heart, error)
        return 1
    return 0


def say_failed(channel: Channel, heart: Heart, error: Exception) -> None:
    with contextlib.suppress(OSError):
        channel.send(Failed(f"{heart.phase}: {type(error).__name__}: {first_line(error)}"))


def dialled() -> socket.socket:
    """The connection to a driver that may be on another host."""
    from foretell.cluster.slot import dial_from_environment

    return dial_from_environment()


def load(setup: Setup, heart: Heart) -> tuple[Runner, Ready]:
    """The rank's share of model and cache, and its place among the others."""
    loading = Loading(setup, heart)
    return loading.on_gpu() if setup.device == "cuda" else loading.on_cpu()


def serve(channel: Channel, runner: Runner, heart: Heart) -> None:
    def done(batch_id: int, results: list[ChunkResult], started: float, parts: dict[str, float]) -> None:
        channel.send(Done(batch_id, results, started, time.monotonic(), parts))

    def failed(error: Exception) -> None:
        say_failed(channel, heart, error)
        os._exit(1)  # from a thread beside the main one, which may be caught in a collective

    execute = runner.begin(done, failed)
    while True:
        if not runner.ahead:
            heart.phase = "idle"
        message = channel.receive()
        if isinstance(message, Stop):
            return
        if isinstance(message, Prepare):
            prepare(channel, runner, message)
            continue
        if not isinstance(message, Step):
            raise TypeError(f"a rank was sent {type(message).__name__}")
        heart.phase = f"step {message.batch.id}"
        execute(message.batch, message.tokens)


def prepare(channel: Channel, runner: Runner, message: Prepare) -> None:
    """Have a form compiled beside the steps, and say when it is."""

    def done(prepared: Future[None]) -> None:
        error = prepared.exception()
        text = "" if error is None else first_line(error) or type(error).__name__
        with contextlib.suppress(OSError):  # the driver is gone: the heart will notice
            channel.send(Prepared(message.number, text, isinstance(error, OverloadedError)))

    found = prepare_grammar(runner.grammars, SamplingParams(structured=message.form))
    if found is not None:
        found.add_done_callback(done)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


if __name__ == "__main__":
    sys.exit(main(None if sys.argv[2] == "dial" else int(sys.argv[2]), tied=sys.argv[1] == "tied"))
