"""``pdserve config``: checks a file of settings, shows what it changes, says what can be set."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Files of settings: check one, see what it changes, see what can be set.",
    no_args_is_help=True,
)

File = Annotated[Path | None, typer.Argument(help="A YAML file; without one, the defaults.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting: part.field=value.")
]


@app.command()
def validate(file: File = None, assignments: Assignments = None) -> None:
    """Say everything that is wrong with the settings, or that nothing is."""
    from pdserve.cluster.commands.splitting import check_parts
    from pdserve.settings import load

    check_parts(load(file, assignments=assignments or ()))
    print("these settings can be used")


@app.command()
def diff(file: File = None, assignments: Assignments = None) -> None:
    """Show what differs from the defaults, environment included."""
    from pdserve.settings import changes, load

    for name, default, value in changes(load(file, assignments=assignments or ())):
        print(f"{name}: {json.dumps(default)} → {json.dumps(value)}")


@app.command()
def schema() -> None:
    """Print a JSON schema of the settings, for editors."""
    from pdserve.settings_schema import settings_schema

    print(json.dumps(settings_schema(), indent=1))
