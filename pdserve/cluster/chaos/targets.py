"""The processes of one cluster on this host.

The router says which workers there are. What else belongs to the same cluster descends from the
same raylet: the processes of its replicas, and the store nodes of its supervisors. Nothing else is
ever touched, whatever its name is.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError
from pdserve.kvstore.directory import ARENA_NAME

NODE_MARK = "pdserve.kvstore.node"
REPLICA_MARK = "ray::ServeReplica:"


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    parent: int
    command: str


def processes(proc: Path = Path("/proc")) -> dict[int, Process]:
    """All that can be looked at; who ends meanwhile is left out."""
    found = {}
    for entry in proc.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if status[0] != "Z":
                    command = (entry / "cmdline").read_text().replace("\0", " ")
                    found[int(entry.name)] = Process(int(entry.name), int(status[1]), command)
    return found


def descendants(all_of_them: Mapping[int, Process], roots: Iterable[int]) -> set[int]:
    found = set(roots)
    while True:
        more = {p.pid for p in all_of_them.values() if p.parent in found} - found
        if not more:
            return found
        found |= more


def by_role(
    workers: Iterable[Mapping[str, Any]], all_of_them: Mapping[int, Process]
) -> dict[str, list[int]]:
    """Process ids by role: ``prefill``, ``decode``, ``router``, ``gateway``, ``store``.

    Args:
        workers: of the router's snapshot.
        all_of_them: of this host.

    Raises:
        ConfigError: none of the workers is a process of this host.
    """
    here = [worker for worker in workers if worker["pid"] in all_of_them]
    replicas = [worker for worker in here if REPLICA_MARK in all_of_them[worker["pid"]].command]
    if not replicas:
        raise ConfigError(
            "no worker of this cluster runs on this host; run pdserve chaos where they are"
        )
    raylets = {all_of_them[worker["pid"]].parent for worker in replicas} - {0, 1}
    ours = descendants(all_of_them, raylets)
    found: dict[str, list[int]] = {role: [] for role in ("prefill", "decode", "router", "gateway")}
    for worker in replicas:
        found[str(worker["role"])].append(worker["pid"])
    found["store"] = [pid for pid in sorted(ours) if NODE_MARK in all_of_them[pid].command]
    for role in ("router", "gateway"):
        found[role] = [
            pid
            for pid in sorted(ours)
            if REPLICA_MARK in all_of_them[pid].command
            and f":{role}" in all_of_them[pid].command.partition(REPLICA_MARK)[2]
        ]
    return {role: sorted(pids) for role, pids in found.items()}


def arena_of(node: int, proc: Path = Path("/proc")) -> Path | None:
    """The file of a store node's arena, which it has mapped."""
    try:
        lines = (proc / str(node) / "maps").read_text().splitlines()
    except OSError:
        return None
    paths = (Path(line.split(maxsplit=5)[-1]) for line in lines if "/" in line)
    return next((path for path in paths if path.name == ARENA_NAME), None)
