"""``pdserve status``: what the router sees, as a table; ``pdserve top`` shows it, too."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdserve.cluster.http_client import get_json


def fetch(url: str) -> dict[str, Any]:
    """The router's snapshot, through the gateway."""
    snapshot: dict[str, Any] = get_json(url, "/cluster/status")
    return snapshot


def render(snapshot: dict[str, Any]) -> Group:
    workers = Table(box=None, pad_edge=False)
    for column in ("worker", "role", "pid", "running", "waiting", "blocks free", "state"):
        workers.add_column(column, justify="left" if column in ("worker", "role") else "right")
    for worker in snapshot["workers"]:
        workers.add_row(
            worker["worker"],
            worker["role"],
            str(worker["pid"]),
            str(worker["running"]),
            str(worker["waiting"]),
            f"{worker['free_blocks']} of {worker['block_count']}",
            _state(worker),
        )
    levels = " ".join(str(count) for count in snapshot["queue_lengths"])
    queue = Text(
        f"queue by level  {levels}   oldest {snapshot['oldest_wait_ms']} ms   "
        f"parked {snapshot['parked']}"
    )
    router = snapshot.get("router", {})
    leads = Text("router           " + "   ".join(f"{name} {n}" for name, n in router.items()))
    counters = Table(box=None, pad_edge=False, show_header=False)
    for name, value in sorted(snapshot["counters"].items()):
        counters.add_row(name, str(value))
    return Group(workers, Text(), queue, leads, Text(), counters)


def _state(worker: Mapping[str, Any]) -> str:
    if worker["draining"]:
        return "leaving"
    return "drained" if worker["duty"] == "none" else "up"
