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
    from foretell.parallel.stage import StageRunner

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
        started = time.perf_counter()
        runner, ready = load(setup, heart)
        ready.phases["whole"] = time.perf_counter() - started
        channel.send(ready)
        serve(channel, runner, heart)
    except EOFError:
        return 1
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(Failed(f"{heart.phase}: {type(error).__name__}: {first_line(error)}"))
        return 1
    return 0


def dialled() -> socket.socket:
    """The connection to a driver that may be on another host."""
    from foretell.cluster.slot import dial_from_environment

    return dial_from_environment()


def load(setup: Setup, heart: Heart) -> tuple[StageRunner, Ready]:
    """The rank's share of model and cache, and its place among the others."""
    phases: dict[str, float] = {}
    started = time.perf_counter()
    heart.phase = "importing torch"
    import torch

    torch.set_num_threads(setup.num_threads)
    from foretell.grammar.compiler import GrammarCompiler
    from foretell.kernels import get_kernels
    from foretell.model.build import Builder
    from foretell.model.load import DTYPES, spec_for
    from foretell.model.weights import DummyWeights, FileWeights, Weights
    from foretell.parallel.comm import Communicator
    from foretell.parallel.layout import make_layout, shard_spec
    from foretell.parallel.shard import ShardedWeights
    from foretell.parallel.stage import StageRunner
    from foretell.parallel.wrap import wrap
    from foretell.store import load_tokenizer, open_tensors, resolve
    from foretell.worker.kv import allocate

    phases["import torch"] = time.perf_counter() - started
    heart.phase = "meeting the other ranks"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    files = resolve(setup.model, offline=setup.offline)
    spec = spec_for(files)
    layout = make_layout(spec, setup.tp, setup.pp)
    place = layout.place(setup.rank)
    comm = Communicator(layout, place, setup.store_url, backend=setup.backend, timeout_seconds=setup.timeout_seconds)
    comm.preflight()
    phases["meeting"] = time.perf_counter() - started - phases["import torch"]
    heart.phase = "loading weights"
    kernels = get_kernels(setup.kernels, batch_invariant=setup.batch_invariant)
    kernels.set_threads(setup.num_threads)
    weights: Weights
    if setup.load_format == "dummy":
        weights = DummyWeights(spec, setup.seed)
    else:
        weights = FileWeights(open_tensors(files), spec)
    if setup.tp > 1:
        weights = ShardedWeights(weights, spec, setup.tp, place.shard)
    own, dtype = shard_spec(spec, setup.tp), DTYPES[setup.dtype]
    before = resident_bytes()
    builder = Builder(own, weights, kernels, dtype, layers=place.layers, keep_quantised=setup.keep_quantised)
    model = wrap(builder.build(), comm, spec.vocab_size)
    resident = resident_bytes() - before
    phases["weights"] = time.perf_counter() - started - sum(phases.values())
    kv = allocate(own, tuple(setup.num_blocks), setup.block_size, dtype, place.layers)
    torch_threads = 1 if kernels.name == "cpu" else None
    runner = StageRunner(model, kv, setup.block_size, comm, spec.vocab_size, torch_threads=torch_threads)
    if runner.samples:
        runner.grammars = GrammarCompiler(lambda: load_tokenizer(files), spec.vocab_size)
    heart.phase = "waiting for the others to load"
    comm.preflight()
    return runner, Ready(model.weight_bytes, resident, model.weight_format, kernels.name, phases)


def serve(channel: Channel, runner: StageRunner, heart: Heart) -> None:
    while True:
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
        started = time.monotonic()
        results = runner.execute_step(message.batch, message.tokens)
        if runner.samples:
            channel.send(Done(message.batch.id, results, started, time.monotonic(), runner.parts))


def prepare(channel: Channel, runner: StageRunner, message: Prepare) -> None:
    """Have a form compiled beside the steps, and say when it is."""

    def done(prepared: Future[None]) -> None:
        error = prepared.exception()
        text = "" if error is None else first_line(error) or type(error).__name__
        with contextlib.suppress(OSError):  # the driver is gone: the heart will notice
            channel.send(Prepared(message.number, text, isinstance(error, OverloadedError)))

    found = prepare_grammar(runner.grammars, SamplingParams(structured=message.form))
    if found is not None:
        found.add_done_callback(done)


def resident_bytes() -> int:
    """Memory of this process alone, without mapped files, after giving back what is free; 0 where nobody tells."""
    import ctypes
    from pathlib import Path

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
    return 0


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


if __name__ == "__main__":
    sys.exit(main(None if sys.argv[2] == "dial" else int(sys.argv[2]), tied=sys.argv[1] == "tied"))
