"""``foretell serve``: OpenAI's and Anthropic's interfaces over one model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from foretell.cli import options as o
from foretell.cli.groups import grouped
from foretell.errors import ConfigError
from foretell.store.aliases import DEFAULT_MODEL

_SERVER, _LIMITS, _WATCHING = "Server", "Limits", "Watching"


@grouped
def serve(
    engine: o.Engine,
    model: o.Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0 takes a free one.", rich_help_panel=_SERVER)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="FORETELL_API_KEY",
            show_envvar=True,
            help="Clients must send it; may be repeated. Others can see it in the process list: prefer the file.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with one API key per line.", rich_help_panel=_SERVER)
    ] = None,
    admin_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys for the admin routes; else the API keys open them.", rich_help_panel=_SERVER),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients use for the model; may be repeated.", rich_help_panel=_SERVER),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that is answered to without a key; may be repeated.", rich_help_panel=_SERVER),
    ] = None,
    allow_anyone: Annotated[
        bool,
        typer.Option("--allow-anyone", help="Listen beyond this machine without a key.", rich_help_panel=_SERVER),
    ] = False,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="Time for requests under way after SIGTERM or Ctrl-C.", rich_help_panel=_SERVER),
    ] = 30.0,
    max_queue: Annotated[
        int,
        typer.Option(min=1, help="Unfinished outputs, running ones included; more get 429.", rich_help_panel=_LIMITS),
    ] = 1024,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.001, help="Most that a request may take.", rich_help_panel=_LIMITS)
    ] = 600.0,
    max_body_bytes: Annotated[
        int,
        typer.Option(parser=o.parse_bytes, metavar="SIZE", help="Largest request body.", rich_help_panel=_LIMITS),
    ] = "4MiB",  # type: ignore[assignment]  # the parser's input, as for every option
    max_prompt_chars: Annotated[
        int, typer.Option(min=1, help="Longest prompt or conversation.", rich_help_panel=_LIMITS)
    ] = 1_000_000,
    max_n: Annotated[int, typer.Option(min=1, help="Most outputs of one prompt.", rich_help_panel=_LIMITS)] = 16,
    max_logprobs: Annotated[
        int, typer.Option(min=1, help="Most alternatives per token.", rich_help_panel=_LIMITS)
    ] = 20,
    max_stops: Annotated[
        int, typer.Option(min=1, max=64, help="Most stop strings of a request.", rich_help_panel=_LIMITS)
    ] = 16,
    max_schema_depth: Annotated[
        int, typer.Option(min=1, max=32, help="Deepest nesting of a JSON schema.", rich_help_panel=_LIMITS)
    ] = 32,
    stored_responses: Annotated[
        int,
        typer.Option(min=0, help="Answers of /v1/responses that are kept in memory.", rich_help_panel=_LIMITS),
    ] = 1024,
    stall_seconds: Annotated[
        float,
        typer.Option(min=1, help="Health turns red after so long a silence of the engine.", rich_help_panel=_LIMITS),
    ] = 30.0,
    hang_seconds: Annotated[
        float, typer.Option(min=1, help="A silent engine is restarted after so long.", rich_help_panel=_LIMITS)
    ] = 300.0,
    replicas: Annotated[
        int,
        typer.Option(min=1, help="Engines that share the load; each has its own memory.", rich_help_panel="Engine"),
    ] = 1,
    step_log: Annotated[
        Path | None, typer.Option(help="Append a JSON line per step to this file.", rich_help_panel="Engine")
    ] = None,
    log_format: Annotated[
        Literal["human", "json"],
        typer.Option(help="Lines for people, or a JSON object per line.", rich_help_panel=_WATCHING),
    ] = "human",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="info: a line per request; never what was asked or answered.", rich_help_panel=_WATCHING),
    ] = "info",
    otlp_traces_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            show_envvar=True,
            metavar="URL",
            help="Send OpenTelemetry spans there; needs foretell\\[otel].",
            rich_help_panel=_WATCHING,
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, to OpenAI's and Anthropic's clients.

    The engine runs in a process of its own, which is restarted should it die. Ctrl-C or SIGTERM lets the requests
    under way finish; a second one ends at once.

    [bold]Examples[/bold]

      foretell serve
      foretell serve gemma3-270m --port 8080 --max-num-seqs 32
      foretell serve ./my-model --host 0.0.0.0 --api-key-file keys.txt
      curl http://127.0.0.1:8000/v1/models
    """
    for seconds in (drain_seconds, timeout_seconds, stall_seconds, hang_seconds):
        if not math.isfinite(seconds):
            raise ConfigError("--…-seconds are finite numbers: give a large one instead of infinity")
    from foretell.assembly import EngineOptions
    from foretell.server.config import ServerConfig
    from foretell.store import resolve

    config = ServerConfig(
        host=host,
        port=port,
        api_keys=(*(api_key or ()), *_keys(api_key_file)),
        admin_api_keys=_keys(admin_key_file),
        allowed_hosts=tuple(allowed_host or ()),
        allow_anyone=allow_anyone,
        served_model_names=tuple(served_model_name or ()) or (model,),
        max_queue=max_queue,
        default_timeout_seconds=timeout_seconds,
        max_timeout_seconds=timeout_seconds,
        max_body_bytes=max_body_bytes,
        max_prompt_chars=max_prompt_chars,
        max_n=max_n,
        max_logprobs=max_logprobs,
        max_stops=max_stops,
        max_schema_depth=max_schema_depth,
        stored_responses=stored_responses,
    )
    options = EngineOptions(model=model, **engine.options(), step_log=step_log)
    resolve(model, offline=options.offline)  # with its download bar, and before anything else is loaded
    from foretell.cli.serve_report import StartReport
    from foretell.server import logs
    from foretell.server.run import serve as serve_until_told
    from foretell.server.supervisor import Watch
    from foretell.server.tracing import tracer_for

    tracer = tracer_for(otlp_traces_endpoint)
    logs.configure(log_format, log_level)
    report = StartReport(model, config)
    try:
        status = serve_until_told(
            options,
            config,
            drain_seconds=drain_seconds,
            replicas=replicas,
            watch=Watch(stall_seconds=stall_seconds, hang_seconds=max(stall_seconds, hang_seconds)),
            observers=(logs.AccessLog(),) if tracer is None else (logs.AccessLog(), tracer),
            on_phase=report.phase,
            on_ready=report.ready,
        )
    finally:
        if tracer is not None:
            tracer.close()
    sys.stdout.flush()
    raise typer.Exit(status)


def _keys(path: Path | None) -> tuple[str, ...]:
    """The lines of a key file; ConfigError if it cannot be read or holds none."""
    if path is None:
        return ()
    try:
        keys = _nonempty(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"the key file {path} cannot be read: {why}") from None
    if not keys:
        raise ConfigError(f"the key file {path} is empty: put one key on each line")
    return keys


def _nonempty(lines: list[str] | None) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines or () if line.strip())
