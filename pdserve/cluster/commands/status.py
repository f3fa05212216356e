"""``pdserve status``: what the router sees, as a table; ``pdserve top`` shows it, too."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pdserve.cluster.http_client import get_json, of_model
from pdserve.vitals import METRICS, RESIDENT_BYTES


def fetch(url: str, model: str | None = None) -> dict[str, Any]:
    """The router's snapshot, through the gateway; of all models together unless one is named."""
    snapshot: dict[str, Any] = get_json(url, of_model("/cluster/status", model))
    return snapshot


def render(snapshot: dict[str, Any]) -> Group:
    models = snapshot.get("models", {})
    workers = Table(box=None, pad_edge=False)
    if models:
        workers.add_column("model")
    for column in ("worker", "role", "pid", "running", "waiting", "blocks free", "memory", "state"):
        workers.add_column(column, justify="left" if column in ("worker", "role") else "right")
    for worker in snapshot["workers"]:
        workers.add_row(
            *([worker["model"]] if models else ()),
            worker["worker"],
            worker["role"],
            str(worker["pid"]),
            str(worker["running"]),
            str(worker["waiting"]),
            f"{worker['free_blocks']} of {worker['block_count']}",
            _memory(worker.get("counters", {})),
            _state(worker),
        )
    lines = [_queue("queue by level ", snapshot)]
    for name, figures in models.items():
        lines.append(_queue(f"  of {name}", figures) if figures else f"  of {name}: no answer")
    queue = Text("\n".join(lines))
    router = snapshot.get("router", {})
    said = {name: value for name, value in router.items() if name not in METRICS}
    said |= {"memory": _memory(router)} if RESIDENT_BYTES in router else {}
    leads = Text(
        "router           " + "   ".join(f"{name} {value}" for name, value in said.items())
    )
    counters = Table(box=None, pad_edge=False, show_header=False)
    for name, value in sorted(snapshot["counters"].items()):
        counters.add_row(name, str(value))
    return Group(workers, Text(), queue, leads, Text(), counters)


def _queue(head: str, snapshot: Mapping[str, Any]) -> str:
    levels = " ".join(str(count) for count in snapshot["queue_lengths"])
    return f"{head} {levels}   oldest {snapshot['oldest_wait_ms']} ms   parked {snapshot['parked']}"


def _memory(figures: Mapping[str, int]) -> str:
    return f"{figures[RESIDENT_BYTES] >> 20} MiB" if RESIDENT_BYTES in figures else ""


def _state(worker: Mapping[str, Any]) -> str:
    if worker["draining"]:
        return "leaving"
    return "drained" if worker["duty"] == "none" else "up"
