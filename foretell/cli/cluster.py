"""``foretell cluster``: which hosts there are, what would go where, and how a running server fares on them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from foretell.cli import options as o
from foretell.cli.guard import Commands, guarded
from foretell.errors import ForetellError

cluster_app = typer.Typer(
    cls=Commands,
    help="Many hosts: what would go where, and how it fares.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Address = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="ADDRESS|auto|local", help="The Ray cluster; auto: the one that this host is in."
    ),
]


def plan(
    cluster: Address = "auto",
    replicas: Annotated[int, typer.Option(min=1, help="Instances of the model.")] = 1,
    tp: o.TP = 1,
    pp: o.PP = 1,
    num_threads: o.Threads = None,
) -> None:
    """What foretell serve --cluster would place where; nothing is started.

    [bold]Examples[/bold]

      foretell cluster plan --replicas 2 --pp 2
    """
    import asyncio

    from foretell.cluster.link import list_hosts
    from foretell.cluster.place import describe, most_cpus_per_rank, place_all, where

    hosts = asyncio.run(list_hosts(cluster))
    cpus = most_cpus_per_rank(hosts, replicas, tp, pp) if num_threads is None else max(1, num_threads // (tp * pp))
    found = place_all(hosts, replicas, tp, pp, cpus)
    print(describe(hosts))
    for number, spans in enumerate(found):
        print(f"instance {number}: {where(spans)}, {cpus} CPU{'s' * (cpus != 1)} per rank")
    if len(found) < replicas:
        raise ForetellError(f"{replicas - len(found)} of {replicas} instances have no place: lower --num-threads")


def status(
    url: Annotated[str, typer.Option(help="Of a running foretell serve.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="FORETELL_API_KEY", show_envvar=True, help="If the server wants one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as one JSON object.")] = False,
) -> None:
    """How the replicas of a running server fare, each and together.

    [bold]Examples[/bold]

      foretell cluster status --url http://127.0.0.1:8000
    """
    import httpx

    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(f"{url.rstrip('/').removesuffix('/v1')}/admin/stats", headers=headers, timeout=10.0)
        answer.raise_for_status()
        stats: dict[str, Any] = answer.json()["stats"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        advice = "give --api-key, which the server must have too" if "403" in why or "401" in why else "is it there?"
        raise ForetellError(f"{url} does not say how it fares: {why}: {advice}") from None
    if as_json:
        print(json.dumps(stats))
        return
    print(
        f"{'replica':8}{'host':34}{'state':12}{'running':>8}{'waiting':>8}{'KV':>7}{'restarts':>9}{'out tokens':>12}"
    )
    for number, one in enumerate(stats.get("replicas", [stats])):
        _line(str(number), one.get("host") or "here", str(one.get("state", "")), one)
    _line("all", "", "", stats)


def _line(name: str, host: str, state: str, stats: dict[str, Any]) -> None:
    usage = f"{100 * stats.get('kv_usage', 0.0):.0f} %"
    print(
        f"{name:8}{host:34}{state:12}{stats.get('running', 0):8}{stats.get('waiting', 0):8}{usage:>7}"
        f"{stats.get('restarts', 0):9}{stats.get('generation_tokens', 0):12}"
    )


for _name, _command in (("plan", plan), ("status", status)):
    cluster_app.command(_name)(guarded(_command))
