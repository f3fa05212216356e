"""``pdserve top``: pools, levels, tiers and rates, live, from two looks at a time.

Rates are of the workers' own counters, so they are the cluster's and not one gateway's. A worker
that came between two looks counts from the next one on, and one that left not at all: what it did
before is no rate.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pdserve.cluster.commands.status import render
from pdserve.cluster.http_client import get_json, get_text
from pdserve.errors import PdserveError

STATUS, METRICS = "/cluster/status", "/metrics"

RATES = {
    "tokens generated": "tokens_generated",
    "prompt tokens computed": "prompt_tokens_computed",
}
"""What is shown, and the workers' counter for it."""

Key = tuple[str, str]
"""Store, and a state, kind or outcome."""


@dataclass(frozen=True, slots=True)
class Look:
    at_s: float
    counts: Mapping[Key, int]  # of the workers: (worker, counter)
    snapshot: Mapping[str, Any]
    slots: Mapping[Key, float]
    held: Mapping[Key, float]
    blocks: Mapping[Key, float]


def look_of(snapshot: Mapping[str, Any], metrics: str, at_s: float) -> Look:
    """``metrics``: the text of the gateway's; "" where it did not answer."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[Key, float]] = {"slots": {}, "held": {}, "blocks": {}}
    labels = {"slots": "state", "held": "kind", "blocks": "outcome"}
    for family in text_string_to_metric_families(metrics):
        name = family.name.removeprefix("pdserve_kv_")
        if name in found and family.name != name:
            for sample in family.samples:
                key = (sample.labels["store"], sample.labels[labels[name]])
                found[name][key] = sample.value
    counts = {
        (worker["worker"], counter): worker["counters"].get(counter, 0)
        for worker in snapshot["workers"]
        for counter in RATES.values()
    }
    return Look(at_s, counts, snapshot, **found)


def rates(before: Look | None, now: Look) -> dict[str, float | None]:
    """Per second, by name; None before the second look."""
    if before is None or now.at_s <= before.at_s:
        return dict.fromkeys(RATES)
    seconds = now.at_s - before.at_s
    return {
        name: sum(
            max(0, count - before.counts[key])
            for key, count in now.counts.items()
            if key[1] == counter and key in before.counts
        )
        / seconds
        for name, counter in RATES.items()
    }


def render_look(before: Look | None, now: Look) -> Group:
    parts: list[RenderableType] = [_rates(rates(before, now)), Text(), render(dict(now.snapshot))]
    if now.slots:
        parts[2:2] = [_stores(now), Text()]
    return Group(*parts)


def _rates(found: Mapping[str, float | None]) -> Text:
    told = (
        f"{name} {'-' if rate is None else format(rate, ',.0f')}/s" for name, rate in found.items()
    )
    return Text("   ".join(told))


def _stores(now: Look) -> Table:
    """One line per store: its slots in memory, what is in hand-off, and where blocks were found."""
    table = Table(box=None, pad_edge=False)
    columns = ("store", "slots used", "kept", "in hand-off", "waiting", "asked", "memory", "disk")
    for column in columns:
        table.add_column(column, justify="left" if column == "store" else "right")
    for store in sorted({store for store, _ in now.slots}):
        slots = {state: count for (name, state), count in now.slots.items() if name == store}
        total = sum(slots.values())
        asked = now.blocks.get((store, "asked"), 0.0)
        table.add_row(
            store,
            f"{total - slots.get('free', 0):,.0f} of {total:,.0f}",
            f"{slots.get('committed', 0):,.0f}",
            f"{slots.get('reserved', 0) + slots.get('private', 0):,.0f}",
            f"{now.held.get((store, 'tickets_queued'), 0):,.0f}",
            f"{asked:,.0f}",
            _share(now.blocks.get((store, "found_memory"), 0.0), asked),
            _share(now.blocks.get((store, "found_disk"), 0.0), asked),
        )
    return table


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def watch(url: str, *, every_s: float) -> None:
    """Redraws until Ctrl-C. A look that fails is said in its place: the next may succeed.

    Raises:
        PdserveError: the first look fails.
    """
    before, now = None, _look(url)
    try:
        with Live(render_look(None, now), auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                try:
                    before, now = now, _look(url)
                except PdserveError as error:
                    live.update(Group(Text(str(error)), Text(), render_look(before, now)))
                else:
                    live.update(render_look(before, now))
                live.refresh()
    except KeyboardInterrupt:
        return


def _look(url: str) -> Look:
    snapshot = get_json(url, STATUS)
    return look_of(snapshot, get_text(url, METRICS), time.monotonic())
