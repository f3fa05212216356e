"""``pdserve doctor``: what would keep a cluster from running well on this machine."""

import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from pdserve.cluster.commands.splitting import check_parts
from pdserve.cluster.places import sockets_directory
from pdserve.config import ClusterConfig, GiB
from pdserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Finding:
    good: bool
    what: str
    remedy: str = ""


def examine(config: ClusterConfig) -> bool:
    """Prints every finding; True where nothing stands in the way."""
    console = Console(highlight=False)
    findings = list(_findings(config))
    for finding in findings:
        mark = "[green]ok[/]  " if finding.good else "[red]no[/]  "
        console.print(mark + escape(finding.what))
        if finding.remedy:
            console.print(f"     {escape(finding.remedy)}")
    return all(finding.good for finding in findings)


def _findings(config: ClusterConfig) -> Iterator[Finding]:
    yield _model(config)
    yield _shared_memory(config)
    yield from _ports(config)
    yield _compiler()
    yield from _device(config)
    yield _sockets(config)


def _model(config: ClusterConfig) -> Finding:
    from pdserve.model.adapter_files import locate_adapters
    from pdserve.model.families.registry import read_architecture
    from pdserve.model.source import locate, storage

    try:
        files = locate(config.model)
        stored_as = storage(files)
        architecture = read_architecture(files)
        adapters = locate_adapters(config.model, files.name)
        check_parts(config)
    except ConfigError as error:
        return Finding(False, f"model: {error}")
    return Finding(
        True,
        f"model {files.name}: {architecture.family}, {architecture.layer_count} layers, context "
        f"{architecture.context_tokens} tokens, weights {stored_as}, {len(adapters)} adapters, "
        f"{files.path}",
    )


def _shared_memory(config: ClusterConfig) -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    wanted = config.store.arena_bytes
    return Finding(
        free >= wanted,
        f"/dev/shm has {free / GiB:.1f} GiB free, the store wants {wanted / GiB:.1f}",
        ""
        if free >= wanted
        else "lower store.arena_bytes, or give the container a larger --shm-size",
    )


def _ports(config: ClusterConfig) -> Iterator[Finding]:
    gateway = config.gateway
    for name, port in (("http_port", gateway.http_port), ("grpc_port", gateway.grpc_port)):
        if port <= 0:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((gateway.host, port))
            except OSError as error:
                yield Finding(
                    False,
                    f"gateway.{name} {port}: {error.strerror}",
                    "stop what listens there, or set another",
                )
            else:
                yield Finding(True, f"gateway.{name} {port} is free")


def _compiler() -> Finding:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        return Finding(True, f"C++ compiler: {compiler}")
    return Finding(
        True, "no C++ compiler: the CPU path runs on torch alone, slower", "apt-get install g++"
    )


def _device(config: ClusterConfig) -> Iterator[Finding]:
    from pdserve.model.machine import machine

    found = machine()
    if config.model.device == "cuda" and found.gpu is None:
        yield Finding(
            False, "model.device is cuda, torch sees no CUDA device", "set model.device=cpu"
        )
    device = found.gpu or f"CPU, {len(os.sched_getaffinity(0))} cores"
    yield Finding(True, f"torch {found.torch} on {device}")
    if Path("/proc/driver/nvidia/version").exists() and found.gpu is None:
        yield Finding(
            False, "an NVIDIA driver is here, torch is a CPU build", "install torch with CUDA"
        )


def _sockets(config: ClusterConfig) -> Finding:
    """Looks at the directory, or at where it would be made, and makes nothing."""
    directory = sockets_directory(config)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if there == directory and there.stat().st_uid != os.getuid():
        return Finding(False, f"{directory} belongs to somebody else", "set `directory`")
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return Finding(False, f"no room for sockets: cannot write in {there}", "set `directory`")
    return Finding(True, f"sockets go to {directory}")
