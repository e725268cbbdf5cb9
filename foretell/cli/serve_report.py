"""What ``foretell serve`` shows: the start as it goes on, then what is served, how much fits, and where."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from foretell.cli import units

if TYPE_CHECKING:
    from foretell.server.config import ServerConfig
    from foretell.server.engine_client import EngineClient
    from foretell.server.replicas import ReplicaSet


class StartReport:
    """On stderr. On a terminal a spinner names the phase that was done last; elsewhere nothing until it is ready."""

    def __init__(self, model: str, config: ServerConfig) -> None:
        self._model = model
        self._config = config
        self._started = time.perf_counter()
        self._phases: list[str] = []
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(f"starting {model} …", refresh_per_second=4)
            self._status.start()

    def phase(self, name: str, seconds: float) -> None:
        """A phase of the engine's start is done."""
        self._phases.append(f"{name} {seconds:.2f}")
        if self._status is not None:
            self._status.update(f"starting {self._model} … {', '.join(self._phases)}")

    def ready(self, client: EngineClient | ReplicaSet, url: str) -> None:
        """The whole report, once."""
        from rich.console import Console
        from rich.table import Table

        if self._status is not None:
            self._status.stop()
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._lines(client, url):
            table.add_row(name, value)
        Console(stderr=True, highlight=False).print(table)
        self._phases.clear()

    def _lines(self, client: EngineClient | ReplicaSet, url: str) -> list[tuple[str, str]]:
        ready, config = client.ready, self._config
        at_full_length = ready.kv_tokens / ready.max_tokens_per_request
        phases = ", ".join(p for p in self._phases if not p.endswith("0.00"))
        weights = f"{ready.weight_format}, {units.binary_bytes(ready.weight_bytes)}, {ready.kernels} kernels"
        keys = f"{len(config.api_keys)} API key(s)" if config.api_keys else "no key needed"
        names = ", ".join(config.served_model_names)
        reach = "from this machine only" if url.startswith(("http://127.", "http://[::1]")) else f"host {config.host}"
        return [
            ("model", f"{names}  [dim]context {ready.max_tokens_per_request:,} tokens{_copies(client)}[/dim]"),
            ("weights", weights),
            ("KV cache", f"{units.binary_bytes(ready.kv_bytes)}, {ready.dtype}: {ready.kv_tokens:,} tokens, "
                         f"or {at_full_length:.1f} sequences of full length; up to {ready.max_num_seqs} run at once"),
            *_foretold(ready.foretold, ready.max_num_seqs),
            ("limits", f"{config.max_queue} unfinished outputs, {config.default_timeout_seconds:g} s per request, "
                       f"bodies of {units.binary_bytes(config.max_body_bytes)}"),
            ("start-up", f"{time.perf_counter() - self._started:.2f} s  [dim]{phases}[/dim]"),
            ("URL", f"[bold]{url}/v1[/bold]  [dim]{keys}, {reach}; Ctrl-C ends it[/dim]"),
        ]  # fmt: skip


def _foretold(figures: dict[str, float], most: int) -> list[tuple[str, str]]:
    """What the machine's calibration says, if there is one; every step will be compared with it."""
    if not figures:
        return []
    alone, full = units.seconds(figures["tpot_alone_seconds"]), units.seconds(figures["tpot_full_seconds"])
    rate = units.rate(figures["prompt_tokens_per_second"])
    text = f"TPOT {alone} alone, {full} with {most} at once; prompts at {rate}"
    return [("foretold", f"{text}  [dim]compared with every step: see /metrics[/dim]")]


def _copies(client: EngineClient | ReplicaSet) -> str:
    """How many engines there are, of which the figures are one's."""
    count = len(getattr(client, "replicas", ()))
    return f"; {count} replicas, each of them:" if count > 1 else ""
