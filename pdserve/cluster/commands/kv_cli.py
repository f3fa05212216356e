"""The command line's ``pdserve kv``: look into the KV stores of a running cluster, and run them.

Nothing heavy is imported up here, as in ``cli``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pdserve.kvstore.security import Credentials

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(help="Where the gateway listens.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Which, where there are several.")]
Nodes = Annotated[
    list[str] | None,
    typer.Option("--node", help="A store node's Unix socket or host:port, instead of the gateway."),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="The cluster's CONFIG.yaml: its certificates and key, for other hosts."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]

kv = typer.Typer(help="Look into the KV stores, and run them.", no_args_is_help=True)


@kv.command()
def warm(
    file: Annotated[Path, typer.Argument(help="JSON lines: prompt, messages or tokens each.")],
    url: Url = DEFAULT_URL,
    pin: Annotated[
        str | None, typer.Option(help="Keep them: 30m (softly), hard, or hard:8h.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Prompts under way at once.")] = 4,
    config: Config = None,
) -> None:
    """Compute prompts ahead, so that requests that begin with them find their KV."""
    from pdserve.cluster.commands.warm import warm as compute

    status = compute(url, file, pin=pin, concurrency=concurrency, credentials=_credentials(config))
    raise typer.Exit(code=status)


@kv.command()
def stat(
    url: Url = DEFAULT_URL, nodes: Nodes = None, config: Config = None, as_json: Json = False
) -> None:
    """Show slots, tiers, pins, tickets, tenants, hits and evictions of each store."""
    from pdserve.cluster.commands.kv import show_stat

    show_stat(url, nodes or [], as_json=as_json, credentials=_credentials(config))


@kv.command()
def audit(
    url: Url = DEFAULT_URL,
    nodes: Nodes = None,
    blocks: Annotated[
        int | None, typer.Option(help="Verify so many checksums of each store; default: all.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check books, headers and checksums of each store; exit status 1 where something is wrong."""
    from pdserve.cluster.commands.kv import audit as check

    status = check(
        url, nodes or [], blocks_max=blocks, as_json=as_json, credentials=_credentials(config)
    )
    raise typer.Exit(code=status)


@kv.command()
def evict(
    url: Url = DEFAULT_URL,
    nodes: Nodes = None,
    tenant: Annotated[
        str | None, typer.Option(help="All of a tenant's; with a prompt: whose it is.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="This prompt and what builds on it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that nobody holds.")] = False,
    pinned: Annotated[bool, typer.Option(help="End soft and hard pins there, too.")] = False,
    config: Config = None,
) -> None:
    """Evict blocks, except those that a reader, a writer or a hard pin holds."""
    from pdserve.cluster.commands.kv import evict as evict_blocks

    evict_blocks(
        url,
        nodes or [],
        tenant=tenant,
        prompt=prompt,
        everything=everything,
        pinned=pinned,
        credentials=_credentials(config),
    )


@kv.command()
def drain(
    host: Annotated[str, typer.Argument(help="A host or store of `pdserve kv stat`.")],
    url: Url = DEFAULT_URL,
    nodes: Nodes = None,
    timeout_s: Annotated[float, typer.Option(help="Wait so long for what is under way.")] = 60.0,
    undo: Annotated[bool, typer.Option("--undo", help="Let it take blocks again.")] = False,
    config: Config = None,
) -> None:
    """Stop a host's stores from taking blocks, and wait until nobody uses them."""
    from pdserve.cluster.commands.kv import drain as drain_host

    status = drain_host(
        url, nodes or [], host, timeout_s=timeout_s, undo=undo, credentials=_credentials(config)
    )
    raise typer.Exit(code=status)


@kv.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="JSON lines with hash_ids: Mooncake's format.")],
    node: Annotated[
        str | None, typer.Option(help="A node's socket or host:port; default: one of its own.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Of a node of its own.")] = 3000,
    block_bytes: Annotated[int, typer.Option(help="Of a node of its own.")] = 64 << 10,
    eviction: Annotated[str, typer.Option(help="Of a node of its own: turns or lru.")] = "turns",
    speed: Annotated[float, typer.Option(help="So many times as fast; 0: no waiting.")] = 10.0,
    requests: Annotated[int | None, typer.Option(help="The first so many.")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Play a trace on a store with real bytes; exit status 1 where a byte is wrong, or a node of
    its own has other hits than the simulation."""
    from pdserve.cluster.commands.replay import Wish
    from pdserve.cluster.commands.replay import replay as play
    from pdserve.kvstore.security import Credentials

    wish = Wish(
        node=node,
        slots=slots,
        block_bytes=block_bytes,
        eviction=eviction,
        speed=speed,
        requests=requests,
        credentials=_credentials(config) or Credentials(),
    )
    raise typer.Exit(code=play(trace, wish, as_json=as_json))


def _credentials(config: Path | None) -> "Credentials | None":
    if config is None:
        return None
    from pdserve.kvstore.security import credentials_of
    from pdserve.settings import load

    return credentials_of(load(config).store)
