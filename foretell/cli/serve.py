"""``foretell serve``: OpenAI's and Anthropic's interfaces over one model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from foretell.cli import options as o
from foretell.cli import serve_options as so
from foretell.cli.groups import grouped
from foretell.store.aliases import DEFAULT_MODEL

if TYPE_CHECKING:
    from foretell.plan.again import PlanWatch
    from foretell.server.engine_client import EngineClient
    from foretell.server.replicas import ReplicaSet


@grouped
def serve(
    reach: so.Reach,
    limits: so.Limits,
    health: so.Health,
    engine: so.ServeEngine,
    on_cluster: so.OnCluster,
    watching: so.Watching,
    model: o.Model = DEFAULT_MODEL,
    plan: so.Plan = None,
) -> None:
    """Serve a model over HTTP, to OpenAI's and Anthropic's clients.

    The engine runs in a process of its own, which is restarted should it die. Ctrl-C or SIGTERM lets the requests
    under way finish; a second one ends at once.

    [bold]Examples[/bold]

      foretell serve
      foretell serve gemma3-270m --port 8080 --max-num-seqs 32
      foretell serve ./my-model --host 0.0.0.0 --api-key-file keys.txt
      foretell serve --plan plan.json
      foretell serve --cluster auto --replicas 2 --max-replicas 4
      curl http://127.0.0.1:8000/v1/models
    """
    so.check_seconds(reach, limits, health, on_cluster)
    watch = health.watch()
    from foretell.assembly import EngineOptions
    from foretell.server.config import ServerConfig
    from foretell.store import resolve

    chosen, replicas = engine.options(), engine.replicas
    if plan is not None:
        from foretell.cli.plan import planning_bar
        from foretell.plan.start import start_of

        asked = None if model == DEFAULT_MODEL else model
        start = start_of(plan, asked, chosen, so.ServeEngine().options(), replicas, bar=planning_bar)
        model, chosen, replicas = start.model, start.options, start.replicas
        print(start.words, file=sys.stderr)
    config = ServerConfig(**reach.config(model), **limits.config())
    options = EngineOptions(model=model, **chosen)
    files = resolve(model, offline=options.offline)  # with its download bar, and before anything else is loaded
    from foretell.cli.serve_report import StartReport
    from foretell.server import logs
    from foretell.server.run import serve as serve_until_told
    from foretell.server.tracing import tracer_for

    tracer = tracer_for(watching.otlp_traces_endpoint)
    logs.configure(watching.log_format, watching.log_level)
    report = StartReport(model, config)
    plans: list[PlanWatch] = []

    def ready(client: EngineClient | ReplicaSet, url: str) -> None:
        report.ready(client, url)
        if plan is not None:
            from foretell.plan.again import PlanWatch

            plans.append(PlanWatch(start.path, files.name, client.stats))
            plans[0].start()

    try:
        status = serve_until_told(
            options,
            config,
            drain_seconds=reach.drain_seconds,
            replicas=replicas,
            cluster=on_cluster.maker(options, replicas, config.max_queue, watch),
            watch=watch,
            observers=(logs.AccessLog(),) if tracer is None else (logs.AccessLog(), tracer),
            on_phase=report.phase,
            on_ready=ready,
        )
    finally:
        for watching_plan in plans:
            watching_plan.end()
        if tracer is not None:
            tracer.close()
    sys.stdout.flush()
    raise typer.Exit(status)
