"""A server from its first line to its exit status: bind, start the engine, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn

from foretell.errors import ConfigError
from foretell.server.app import create_app
from foretell.server.engine_client import EngineClient
from foretell.server.http_connection import HttpConnection
from foretell.server.replicas import ReplicaSet, make_replicas

if TYPE_CHECKING:
    from foretell.assembly import EngineOptions
    from foretell.server.config import ServerConfig
    from foretell.server.story import Observer
    from foretell.server.supervisor import Watch

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75  # longer than the 60 of common proxies, which would else meet closed connections
MAX_FILES, OWN_FILES = 65536, 200
LAST_WORDS_SECONDS = 2.0  # after the drain's end, for errors to reach their clients

_ADVICE = {
    errno.EADDRINUSE: "something listens there already: stop it or give another --port",
    errno.EACCES: "ports below 1024 are reserved: give another --port",
}

OnPhase = Callable[[str, float], None]
OnReady = Callable[[EngineClient | ReplicaSet, str], None]  # the engine, and the URL that is listened on


def serve(
    options: EngineOptions,
    config: ServerConfig,
    *,
    drain_seconds: float = 30.0,
    replicas: int = 1,
    cluster: Callable[[], ReplicaSet] | None = None,
    watch: Watch | None = None,
    observers: Sequence[Observer] = (),
    on_phase: OnPhase = lambda name, seconds: None,
    on_ready: OnReady = lambda client, url: None,
    **client_options: Any,
) -> int:
    """Serve until a signal ends it; returns the exit status. ForetellError if it cannot start. ``cluster`` makes
    engines on its hosts."""
    with listen(config.host, config.port) as listener:
        client: EngineClient | ReplicaSet
        if cluster is not None:
            client = cluster()
        elif replicas > 1:
            client = make_replicas(options, replicas, max_queue=config.max_queue, watch=watch)
        else:
            client = EngineClient(options, max_queue=config.max_queue, watch=watch, **client_options)
        server = Server(client, config, listener, drain_seconds, observers)
        return _run(server.run(on_phase, on_ready))


def _run(main: Any) -> int:
    try:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main)  # type: ignore[no-any-return]
    except ImportError:  # Windows
        return asyncio.run(main)  # type: ignore[no-any-return]


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket; nobody can connect before the server listens. ConfigError if there is no such place."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror or error}: give another --host") from None
    listener = socket.socket(family, kind, protocol)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise _cannot_listen(host, port, error) from None
        yield listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    advice = _ADVICE.get(error.errno or 0, f"{error.strerror}: give another --host")
    return ConfigError(f"cannot listen on {host}:{port}: {advice}")


def max_connections() -> int:
    """As many as the process may open files, less some of its own; the limit is raised as far as it can be."""
    try:
        import resource
    except ImportError:  # Windows
        return 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return max(64, soft - OWN_FILES)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server:
    """Signals, in order: the first drains (requests under way have ``drain_seconds``), the second ends at once."""

    def __init__(
        self,
        client: EngineClient | ReplicaSet,
        config: ServerConfig,
        listener: socket.socket,
        drain_seconds: float,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.client = client
        self.config = config
        self.listener = listener
        self.drain_seconds = drain_seconds
        self.observers = observers
        self._http: _Uvicorn | None = None
        self._starting: asyncio.Task[None] | None = None
        self._signal: int | None = None

    async def run(self, on_phase: OnPhase, on_ready: OnReady) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            self._starting = asyncio.create_task(self.client.start(on_phase))
            try:
                await self._starting
            except asyncio.CancelledError:
                if self._signal is None:
                    raise
                return 128 + self._signal  # told to stop while it started
            try:
                self.listener.listen(BACKLOG)
            except OSError as error:  # another server was faster while our engine started
                raise _cannot_listen(self.config.host, self.config.port, error) from None
            on_ready(self.client, url_of(self.listener))
            await self._serve()
            return 0 if self._http is None or not self._http.force_exit else 128 + (self._signal or 0)
        finally:
            forced = self._http is not None and self._http.force_exit
            await self.client.close(grace_seconds=0.0 if forced else 5.0)

    async def _serve(self) -> None:
        app = create_app(self.client, self.config, observers=self.observers)
        self._http = _Uvicorn(
            uvicorn.Config(
                app,
                http=HttpConnection,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                limit_concurrency=max_connections(),
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(self.drain_seconds + LAST_WORDS_SECONDS) + 1,
            )
        )
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what is no HTTP must not fill the log
        gc.collect()
        gc.freeze()  # modules and the tokenizer stay: the collector need not look at them again
        await self._http.serve(sockets=[self.listener])

    def _on_signal(self, number: int) -> None:
        first, self._signal = self._signal is None, self._signal or number
        if self._http is None:
            if self._starting is not None:
                self._starting.cancel()
        elif first:
            self._http.stop_listening()
            self.client.drain()
            asyncio.get_running_loop().call_later(
                self.drain_seconds, self.client.end_all, "the server is shutting down"
            )
        else:
            self._http.force_exit = True
            self.client.end_all("the server was told to end at once")


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us."""

    def stop_listening(self) -> None:
        """Now, and not when the main loop comes round; then finish what is under way."""
        self.should_exit = True
        for listening in getattr(self, "servers", ()):
            listening.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
