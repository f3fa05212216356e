"""``pdserve chaos``: say what would be done, do it if that is allowed, and report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pdserve.cluster.chaos import plan
from pdserve.cluster.commands.bars import spinner
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError

LOCAL_REPLICAS = 2
"""Of each pool of a cluster of our own: the promise is for those where a healthy one remains."""


def chaos(
    config: ClusterConfig,
    *,
    url: str,
    seed: int,
    seconds: float,
    kinds: Sequence[str],
    local: bool,
    allowed: bool,
    json_file: Path | None,
) -> bool:
    """Whether every promise was kept.

    Raises:
        ConfigError: it is not allowed, or cannot be done here.
    """
    console = Console(highlight=False)
    strikes = plan.drawn(seed, seconds=seconds, kinds=kinds)
    target = "a cluster of its own" if local else url
    console.print(f"pdserve chaos, seed {seed}: {seconds:.0f} s of load on {target}, and")
    for strike in strikes:
        console.print(f"  {strike}", markup=False)
    if not (local or allowed):
        raise ConfigError(
            f"these are real faults to the processes behind {url}: add --yes to do it, or --local "
            "for a cluster of its own"
        )
    if local:
        return _local(console, config, seed, seconds, strikes, json_file)
    return _strike(console, url, seed, seconds, strikes, json_file, _disk_of(config))


def _local(
    console: Console,
    config: ClusterConfig,
    seed: int,
    seconds: float,
    strikes: Sequence[plan.Strike],
    json_file: Path | None,
) -> bool:
    from pdserve.cluster.local import interrupt_once, local_cluster

    interrupt_once()
    config = replace(
        config,
        prefill=replace(config.prefill, replicas=max(LOCAL_REPLICAS, config.prefill.replicas)),
        decode=replace(config.decode, replicas=max(LOCAL_REPLICAS, config.decode.replicas)),
        gateway=replace(config.gateway, http_port=0, grpc_port=-1),
        tcp=False,
    )
    with local_cluster(config, progress=lambda text: console.print(f"[dim]{text}[/]")) as cluster:
        disk = _disk_of(config)
        return _strike(console, cluster.http, seed, seconds, strikes, json_file, disk)


def _strike(
    console: Console,
    url: str,
    seed: int,
    seconds: float,
    strikes: Sequence[plan.Strike],
    json_file: Path | None,
    disk: Path | None,
) -> bool:
    from pdserve.cluster.chaos.run import strike_cluster

    with spinner(f"{seconds:.0f} s of load", console):
        report = strike_cluster(
            url,
            seed=seed,
            seconds=seconds,
            strikes=strikes,
            disk=disk,
            progress=lambda text: console.print(f"[dim]{text}[/]"),
        )
    console.print(report.text(), markup=False)
    if json_file is not None:
        report.write(json_file)
    return report.verdict.good


def _disk_of(config: ClusterConfig) -> Path | None:
    directory = config.store.ssd_directory
    return None if directory is None else Path(directory).expanduser()
