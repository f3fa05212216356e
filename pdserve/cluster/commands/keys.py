"""``pdserve keys``: adds, shows and takes away the keys of a gateway."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The API keys of a gateway, in the file that gateway.api_keys names.",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Option(help="The file of keys.")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What logs call it.")],
    file: File,
    tenant: Annotated[str | None, typer.Option(help="Whose it is; default: its name.")] = None,
    admin: Annotated[bool, typer.Option(help="May see the cluster: status, top, record.")] = False,
    requests_per_min: Annotated[int | None, typer.Option(help="At each gateway.")] = None,
) -> None:
    """Make a key and print it, once. A running gateway takes it within a second."""
    from pdserve.cluster.commands.key_edits import new_key

    print(
        new_key(file, name, tenant=tenant or name, admin=admin, requests_per_min=requests_per_min)
    )


@app.command()
def remove(name: str, file: File) -> None:
    """Take a key away. A running gateway refuses it within a second."""
    from pdserve.cluster.commands.key_edits import remove_key

    remove_key(file, name)


@app.command()
def quota(
    tenant: str,
    file: File,
    tokens_per_min: Annotated[int | None, typer.Option(help="Of a minute of the clock.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Of a day of UTC.")] = None,
) -> None:
    """Bound a tenant's tokens, prompt and answer together; without a bound, lift what it has."""
    from pdserve.cluster.commands.key_edits import set_quota
    from pdserve.cluster.gateway.quotas import Quota

    set_quota(file, tenant, Quota(tokens_per_min, tokens_per_day))


@app.command(name="list")
def list_(file: File) -> None:
    """Show whose keys there are."""
    from rich.console import Console
    from rich.table import Table

    from pdserve.cluster.gateway.access import read_keys

    table = Table("name", "tenant", "admin", "requests per minute")
    found = read_keys(file)
    for key in found.keys:
        rate = "" if key.requests_per_min is None else str(key.requests_per_min)
        table.add_row(key.name, key.tenant, "yes" if key.admin else "", rate)
    Console().print(table)
    if found.quotas:
        quotas = Table("tenant", "tokens per minute", "tokens per day")
        for tenant, quota in sorted(found.quotas.items()):
            bounds = (quota.tokens_per_min, quota.tokens_per_day)
            quotas.add_row(tenant, *("" if bound is None else f"{bound:,}" for bound in bounds))
        Console().print(quotas)
