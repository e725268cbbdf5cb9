"""Options of ``foretell serve``, in groups, and what becomes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from foretell.cli import options as o
from foretell.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from foretell.assembly import EngineOptions
    from foretell.server.replicas import ReplicaSet
    from foretell.server.supervisor import Watch

_SERVER, _LIMITS, _WATCHING, _ENGINE, _CLUSTER = "Server", "Limits", "Watching", "Engine", "Cluster"


@dataclass(frozen=True)
class Reach:
    """Where it listens, and to whom."""

    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="FORETELL_API_KEY",
            show_envvar=True,
            help="Clients must send it; may be repeated. Others can see it in the process list: prefer the file.",
            rich_help_panel=_SERVER,
        ),
    ] = None
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key per line.", rich_help_panel=_SERVER)
    ] = None
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys for the admin routes; else the API keys open them.", rich_help_panel=_SERVER),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients use for the model; may be repeated.", rich_help_panel=_SERVER),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that is answered to without a key; may be repeated.", rich_help_panel=_SERVER),
    ] = None
    allow_anyone: Annotated[
        bool,
        typer.Option("--allow-anyone", help="Listen beyond this machine without a key.", rich_help_panel=_SERVER),
    ] = False
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="Time for requests under way after SIGTERM or Ctrl-C.", rich_help_panel=_SERVER),
    ] = 30.0

    def config(self, model: str) -> dict[str, Any]:
        """By the names of ServerConfig."""
        return {
            "host": self.host,
            "port": self.port,
            "api_keys": (*(self.api_key or ()), *_keys(self.api_key_file)),
            "admin_api_keys": _keys(self.admin_key_file),
            "allowed_hosts": tuple(self.allowed_host or ()),
            "allow_anyone": self.allow_anyone,
            "served_model_names": tuple(self.served_model_name or ()) or (model,),
        }


@dataclass(frozen=True)
class Limits:
    """What no request may exceed; the fields but one are ServerConfig's."""

    max_queue: Annotated[
        int,
        typer.Option(min=1, help="Unfinished outputs, running ones included; more get 429.", rich_help_panel=_LIMITS),
    ] = 1024
    timeout_seconds: Annotated[
        float, typer.Option(min=0.001, help="Most that a request may take.", rich_help_panel=_LIMITS)
    ] = 600.0
    max_body_bytes: Annotated[
        int,
        typer.Option(parser=o.parse_bytes, metavar="SIZE", help="Largest request body.", rich_help_panel=_LIMITS),
    ] = "4MiB"  # type: ignore[assignment]  # the parser's input as for every option
    max_prompt_chars: Annotated[
        int, typer.Option(min=1, help="Longest prompt or conversation.", rich_help_panel=_LIMITS)
    ] = 1_000_000
    max_n: Annotated[int, typer.Option(min=1, help="Most outputs of one prompt.", rich_help_panel=_LIMITS)] = 16
    max_logprobs: Annotated[
        int, typer.Option(min=1, help="Most alternatives per token.", rich_help_panel=_LIMITS)
    ] = 20
    max_stops: Annotated[
        int, typer.Option(min=1, max=64, help="Most stop strings of a request.", rich_help_panel=_LIMITS)
    ] = 16
    max_schema_depth: Annotated[
        int, typer.Option(min=1, max=32, help="Deepest nesting of a JSON schema.", rich_help_panel=_LIMITS)
    ] = 32
    stored_responses: Annotated[
        int,
        typer.Option(min=0, help="Answers of /v1/responses that are kept in memory.", rich_help_panel=_LIMITS),
    ] = 1024

    def config(self) -> dict[str, Any]:
        limits = dict(vars(self))
        seconds = limits.pop("timeout_seconds")
        return limits | {"default_timeout_seconds": seconds, "max_timeout_seconds": seconds}


@dataclass(frozen=True)
class Health:
    """When an engine is no longer taken for alive."""

    stall_seconds: Annotated[
        float,
        typer.Option(min=1, help="Health turns red after so long a silence of the engine.", rich_help_panel=_LIMITS),
    ] = 30.0
    hang_seconds: Annotated[
        float, typer.Option(min=1, help="A silent engine is restarted after so long.", rich_help_panel=_LIMITS)
    ] = 300.0

    def watch(self) -> Watch:
        """ConfigError where an engine would be restarted before its health turns red."""
        from foretell.server.supervisor import Watch

        if self.hang_seconds < self.stall_seconds:
            raise ConfigError(
                f"--hang-seconds {self.hang_seconds:g} is less than --stall-seconds {self.stall_seconds:g}: "
                "raise the one or lower the other"
            )
        return Watch(stall_seconds=self.stall_seconds, hang_seconds=self.hang_seconds)


Plan = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|auto",
        help="Start what foretell plan chose; auto: the model's last plan, made now if there is none.",
        rich_help_panel="Engine",
    ),
]


@dataclass(frozen=True)
class ServeEngine(o.Engine):
    """``replicas`` is the server's; the rest are EngineOptions'."""

    replicas: Annotated[
        int,
        typer.Option(min=1, help="Engines that share the load; each has its own memory.", rich_help_panel="Engine"),
    ] = 1
    step_log: Annotated[
        Path | None, typer.Option(help="Append a JSON line per step to this file.", rich_help_panel="Engine")
    ] = None

    def options(self) -> dict[str, Any]:
        options = super().options()
        del options["replicas"]
        return options


@dataclass(frozen=True)
class OnCluster:
    """Engines on the hosts of a Ray cluster."""

    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|auto|local",
            help="On a Ray cluster's hosts; auto: the one that this host is in; local: one of its own.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Up to so many replicas when requests queue.", rich_help_panel=_CLUSTER),
    ] = None
    scale_up_seconds: Annotated[
        float, typer.Option(min=1, help="A queue that lasts so long brings a replica.", rich_help_panel=_CLUSTER)
    ] = 10.0
    scale_down_seconds: Annotated[
        float, typer.Option(min=1, help="A load that long too small takes one away.", rich_help_panel=_CLUSTER)
    ] = 120.0

    def maker(
        self, options: EngineOptions, replicas: int, max_queue: int, watch: Watch
    ) -> Callable[[], ReplicaSet] | None:
        """What makes the engines; None without a cluster."""
        if self.cluster is None:
            if self.max_replicas is not None:
                raise ConfigError(
                    "--max-replicas needs --cluster: on one machine there are as many as --replicas says"
                )
            return None
        from foretell.cluster.replicas import ClusterReplicas

        address = self.cluster
        return lambda: ClusterReplicas(
            options,
            address,
            least=replicas,
            most=self.max_replicas or replicas,
            max_queue=max_queue,
            watch=watch,
            up_seconds=self.scale_up_seconds,
            down_seconds=self.scale_down_seconds,
        )


@dataclass(frozen=True)
class Watching:
    """What it tells of itself."""

    log_format: Annotated[
        Literal["human", "json"],
        typer.Option(help="Lines for people, or a JSON object per line.", rich_help_panel=_WATCHING),
    ] = "human"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="info: a line per request; never what was asked or answered.", rich_help_panel=_WATCHING),
    ] = "info"
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            show_envvar=True,
            metavar="URL",
            help="Send OpenTelemetry spans there; needs foretell\\[otel].",
            rich_help_panel=_WATCHING,
        ),
    ] = None


def check_seconds(*groups: object) -> None:
    """ConfigError for an infinity, which no timer takes."""
    for group in groups:
        for name, value in vars(group).items():
            if name.endswith("_seconds") and not math.isfinite(value):
                option = name.replace("_", "-")
                raise ConfigError(f"--{option} is a finite number: give a large one instead of {value}")


def _keys(path: Path | None) -> tuple[str, ...]:
    """The lines of a key file; ConfigError if it cannot be read or holds none."""
    if path is None:
        return ()
    try:
        keys = _lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the key file {path} cannot be read: {why}") from None
    if not keys:
        raise ConfigError(f"the key file {path} is empty: put one key on each line")
    return keys


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())
