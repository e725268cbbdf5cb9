"""The engine process: the main thread turns the engine loop, a second one reads commands. Token ids only.

Started by the supervisor as ``python -m foretell.server.engine_process FD``; FD is its end of a socket pair. It ends
when that socket does, and with its parent, whatever it is doing.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from foretell.children import die_with_parent
from foretell.core.messages import Output
from foretell.engine_loop import EngineLoop, LocalPort
from foretell.errors import ConfigError, ForetellError, InvalidRequestError
from foretell.server import wire
from foretell.server.commands import Commands

if TYPE_CHECKING:
    from foretell.core.engine import Engine
    from foretell.cost.watch import StepWatch

OnPhase = Callable[[str, float], None]
Build = Callable[[dict[str, Any], OnPhase], "tuple[Engine, wire.Ready]"]

STATS_SECONDS = 0.25  # between two reports of a busy engine
_RECEIVE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 4 << 20


class EngineServer:
    """One engine, one connection. Everything is sent from the loop's thread."""

    def __init__(self, engine: Engine, connection: socket.socket) -> None:
        self._engine = engine
        self._connection = connection
        self._loop = EngineLoop(engine, self._send_step, self._on_stop)
        self._port = LocalPort(engine)
        self._commands = Commands(engine)
        self._preparing: set[int] = set()  # first ids of requests whose grammars are being compiled
        self._stats_due = 0.0
        self._shutdown = False

    def run(self, reader: wire.FrameReader) -> None:
        """Until the other side says so or is gone."""
        threading.Thread(target=self._read, args=(reader,), name="foretell-commands", daemon=True).start()
        self._loop.run()

    # -- the reading thread -------------------------------------------------------------------------

    def _read(self, reader: wire.FrameReader) -> None:
        try:
            while data := self._connection.recv(_RECEIVE_BYTES):
                for message in reader.feed(data):
                    self._take(message)
        except wire.WireError as error:
            say(f"the server's process sent what cannot be read: {error}")
        except OSError:
            pass
        except ForetellError:  # the loop has stopped
            return
        if not self._shutdown:
            os._exit(1)  # nobody is left to work for, and the step in progress may be long

    def _take(self, message: wire.ToEngine) -> None:
        post = self._loop.post
        match message:
            case wire.Add():
                self._prepare(message)
            case wire.Finish(request_ids, reason):
                self._preparing.difference_update(request_ids)
                post(lambda: self._port.finish(request_ids, reason))
            case wire.Control():
                post(lambda: self._answer(message))
            case wire.Ping():
                post(self._send_stats)
            case wire.Shutdown():
                self._shutdown = True
                self._loop.close()
            case wire.Start():
                raise wire.WireError("a second start")

    def _prepare(self, message: wire.Add) -> None:
        """Add it, once what it needs is compiled beside the steps, and unless it was finished meanwhile."""
        prepared = self._engine.executor.prepare(message.params)
        if prepared is None:
            self._loop.post(lambda: self._add(message))
            return
        self._preparing.add(message.first_id)

        def done(prepared: Future[None]) -> None:
            with suppress(ForetellError):  # the loop has stopped
                self._loop.post(lambda: self._add_prepared(message, prepared))

        prepared.add_done_callback(done)

    # -- the loop's thread --------------------------------------------------------------------------

    def _add_prepared(self, message: wire.Add, prepared: Future[None]) -> None:
        if message.first_id not in self._preparing:
            return
        self._preparing.discard(message.first_id)
        error = None if prepared.cancelled() else prepared.exception()
        if error is not None:
            self._send(wire.Refused(message.first_id, one_line(error)))
        else:
            self._add(message)

    def _add(self, message: wire.Add) -> None:
        try:
            self._port.add(
                message.first_id,
                message.prompt_token_ids,
                message.params,
                priority=message.priority,
                arrival=message.arrival,
            )
        except InvalidRequestError as error:
            self._send(wire.Refused(message.first_id, str(error)))

    def _answer(self, message: wire.Control) -> None:
        try:
            value = self._commands.run(message.command, message.arguments)
            frame = wire.encode(wire.Answer(message.call_id, value))
        except Exception as error:
            frame = wire.encode(wire.Answer(message.call_id, None, one_line(error)))
        self._connection.sendall(frame)

    def _send_step(self, outputs: list[Output], now: float) -> None:
        request_ids: list[int] = []
        token_ids: list[int] = []
        news: list[Output] = []
        for output in outputs:
            token_id = output.token_id
            more = output.progress or output.logprobs or output.finish_reason
            if more is None and token_id is not None:
                request_ids.append(output.request_id)
                token_ids.append(token_id)
            else:
                news.append(output)
        step = wire.Step(now, request_ids, token_ids, news)
        try:
            self._connection.sendall(wire.encode(step))
        except wire.WireError:
            self._send_one_by_one(step)
        if now >= self._stats_due or not self._engine.has_work:
            self._send_stats()

    def _send_one_by_one(self, step: wire.Step) -> None:
        """What is too long for one frame; a request whose news is too long by itself ends with an error."""
        self._send(wire.Step(step.now, step.request_ids, step.token_ids, []))
        for output in step.news:
            try:
                frame = wire.encode(wire.Step(step.now, [], [], [output]))
            except wire.WireError as error:
                self._engine.finish(output.request_id, "error")
                failed = Output(output.request_id, finish_reason="error", error=str(error), progress=output.progress)
                frame = wire.encode(wire.Step(step.now, [], [], [failed]))
            self._connection.sendall(frame)

    def _send_stats(self) -> None:
        self._stats_due = monotonic() + STATS_SECONDS
        self._send(wire.Stats(self._engine.stats(), monotonic()))

    def _send(self, message: wire.Message) -> None:
        self._connection.sendall(wire.encode(message))

    def _on_stop(self, error: BaseException | None) -> None:
        if isinstance(error, OSError):  # the connection: the other side is gone
            os._exit(1)
        if error is not None:
            self._send(wire.Failed(one_line(error), user_error=False))
        self._engine.executor.close()


def serve(fd: int, build: Build) -> int:
    """The engine process from its start to its exit status."""
    die_with_parent()
    for interrupt in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the parent drains, then ends us
        signal.signal(interrupt, signal.SIG_IGN)
    connection = socket.socket(fileno=fd)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    reader = wire.FrameReader(wire.to_engine)
    try:
        start = receive_start(connection, reader)
        engine, ready = build(start.options, lambda name, s: connection.sendall(wire.encode(wire.Phase(name, s))))
        connection.sendall(wire.encode(ready))
    except OSError as error:
        say(f"the engine's start: {one_line(error)}")
        return 1
    except Exception as error:
        user_error = isinstance(error, ForetellError) and not isinstance(error, wire.WireError)
        connection.sendall(wire.encode(wire.Failed(one_line(error), user_error)))
        return 1
    gc.collect()
    gc.freeze()  # what has been loaded stays: the collector need not look at it again
    EngineServer(engine, connection).run(reader)
    return 0


def receive_start(connection: socket.socket, reader: wire.FrameReader) -> wire.Start:
    """The first message; WireError if it is none, or another."""
    while data := connection.recv(_RECEIVE_BYTES):
        for message in reader.feed(data):
            if isinstance(message, wire.Start):
                return message
            raise wire.WireError(f"a start was due, {type(message).__name__} came")
    raise ConnectionResetError("the server's process is gone")


def build(options: dict[str, Any], on_phase: OnPhase) -> tuple[Engine, wire.Ready]:
    """The engine that the options describe, and what to tell of it."""
    from foretell.assembly import EngineOptions, assemble
    from foretell.cost.rates import rates_foretold
    from foretell.cost.watch import StepWatch

    try:
        made = EngineOptions(**options)
    except TypeError as error:
        raise ConfigError(f"engine options: {error}") from None
    assembly = assemble(made, on_phase=on_phase)
    watcher = assembly.engine.watcher
    foretold: dict[str, float] = {}
    if isinstance(watcher, StepWatch):
        watcher.on_wrong = drifted
        foretold = rates_foretold(watcher.profile, assembly.engine.scheduler.config)
    return assembly.engine, wire.Ready(
        model=made.model,
        spec=assembly.spec,
        vocab_size=assembly.spec.vocab_size,
        eos_token_ids=assembly.eos_token_ids,
        max_model_len=assembly.engine.scheduler.config.max_model_len,
        max_tokens_per_request=assembly.max_model_len,
        max_num_seqs=assembly.engine.scheduler.config.max_num_seqs,
        dtype=assembly.dtype,
        weight_format=assembly.weight_format,
        kernels=assembly.kernels,
        weight_bytes=assembly.weight_bytes,
        kv_bytes=assembly.kv_bytes,
        kv_element_bytes=assembly.kv_element_bytes,
        kv_tokens=assembly.kv_tokens,
        phases=assembly.phases,
        foretold=foretold,
    )


def drifted(watch: StepWatch) -> None:
    """Say that the profile is wrong, and keep beside the calibration what it should be."""
    from foretell.cost.named import refitted_path

    path = refitted_path(watch.profile.model)
    try:
        watch.refitted().save(path)
        kept = f"; as it is now it is kept in {path}"
    except OSError as error:
        kept = f"; {path} cannot be written: {error.strerror}"
    say(f"the prediction: {watch.words()}{kept}")


def one_line(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller model, dtype or kv_cache_bytes"
    text = " ".join(str(error).split())
    return text if isinstance(error, ForetellError) else f"{type(error).__name__}: {text}"


def _fd(argument: str) -> int:
    """Of the connection that was inherited, or is dialled as the environment says."""
    if argument != "dial":
        return int(argument)
    from foretell.cluster.slot import dial_from_environment

    return dial_from_environment().detach()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(serve(_fd(sys.argv[1]), build))
