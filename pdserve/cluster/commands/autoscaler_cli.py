"""``pdserve autoscaler``: what the autoscaler did and why, and what another policy would have done.

Nothing heavy is imported up here.
"""

from pathlib import Path
from typing import Annotated

import typer

from pdserve.cluster.commands.kv_cli import DEFAULT_URL, OfModel, Url

app = typer.Typer(help="How many workers the pools have, and why.", no_args_is_help=True)

Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
]


@app.callback()
def _group() -> None:
    """How many workers the pools have, and why."""


@app.command()
def explain(
    url: Url = DEFAULT_URL,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Play what was seen through other settings.")
    ] = False,
    observations: Annotated[
        Path | None, typer.Option("--from", help="A file of --save, instead of a cluster.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write what the autoscaler has seen to a new file.")
    ] = None,
    model: OfModel = None,
    config: Annotated[str | None, typer.Option(help="A CONFIG.yaml, for --dry-run.")] = None,
    assignments: Assignments = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Show the last decisions of a running cluster, with figures and reasons."""
    from pdserve.cluster.commands import autoscaler as command

    if dry_run or observations is not None:
        command.dry_run(url, observations, config, assignments or [], as_json=as_json, model=model)
    elif save is not None:
        command.save(url, save, model)
    else:
        command.explain(url, as_json=as_json, model=model)
