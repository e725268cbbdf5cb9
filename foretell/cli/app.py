"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from foretell.cli.bench import bench_app
from foretell.cli.chat import chat
from foretell.cli.cluster import cluster_app
from foretell.cli.foresee import calibrate, simulate
from foretell.cli.guard import Commands, guarded
from foretell.cli.inspect import inspect
from foretell.cli.models import models
from foretell.cli.plan import plan
from foretell.cli.run import run
from foretell.cli.run_batch import run_batch
from foretell.cli.serve import serve
from foretell.cli.version import show_version, version_option

app = typer.Typer(
    name="foretell",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a traceback of ours must be whole; users' errors never have one
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[dim]foretell COMMAND --help shows options and examples.[/dim]",
)


@app.callback()
def foretell(
    version: Annotated[
        bool, typer.Option("--version", callback=version_option, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """An LLM inference engine that knows its own cost.

    [bold]Start here[/bold]

      foretell run "Why is the sky blue?"    fetch the default model and answer
      foretell chat                          talk with it
      foretell serve                         serve it to OpenAI's and Anthropic's clients
      foretell inspect smollm2-135m          what the model is and what it costs
      foretell models                        what else can be run
    """


app.command("run")(guarded(run))
app.command("chat")(guarded(chat))
app.command("serve")(guarded(serve))
app.command("models")(guarded(models))
app.command("inspect")(guarded(inspect))
app.command("run-batch")(guarded(run_batch))
app.add_typer(bench_app, name="bench")
app.add_typer(cluster_app, name="cluster")
app.command("calibrate")(guarded(calibrate))
app.command("simulate")(guarded(simulate))
app.command("plan")(guarded(plan))
app.command("version")(guarded(show_version))
