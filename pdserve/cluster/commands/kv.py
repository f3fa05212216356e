"""``pdserve kv stat | audit | evict | drain``: what they ask the stores, and how it is shown."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pdserve.cluster.http_client import post_json
from pdserve.cluster.kv_master import masters_in, move_away, show_master
from pdserve.cluster.kv_stores import Store, stores_of
from pdserve.errors import ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore.admin import StoreReport
from pdserve.kvstore.security import Credentials

POLL_S = 0.1
"""Between two looks at a node that drains."""

TENANTS_SHOWN = 10

console = Console(highlight=False, soft_wrap=True)


def show_stat(
    url: str, nodes: Sequence[str], *, as_json: bool, credentials: Credentials | None = None
) -> None:
    """``credentials``, here and below: for stores on other hosts."""
    with stores_of(url, nodes, credentials) as stores:
        reports = [(store, store.admin.report()) for store in stores]
    if as_json:
        print(json.dumps([_plain(store, report) for store, report in reports], indent=2))
        return
    for store, report in reports:
        console.print(_shown(store, report))
    show_master(masters_in(report for _, report in reports), credentials)


def audit(
    url: str,
    nodes: Sequence[str],
    *,
    blocks_max: int | None,
    as_json: bool,
    credentials: Credentials | None = None,
) -> int:
    """The exit status: 1 where anything is wrong."""
    with stores_of(url, nodes, credentials) as stores:
        reports = [(store, store.admin.audit(blocks_max)) for store in stores]
    if as_json:
        print(
            json.dumps(
                [{"store": s.name, "host": s.host, **asdict(report)} for s, report in reports],
                indent=2,
            )
        )
    else:
        for store, report in reports:
            said = "all as it should be" if not report.findings else "WRONG"
            console.print(
                f"{store.name} on {store.host}: {report.slots:,} slots, {report.verified:,} "
                f"checksums: {said}"
            )
            for finding in report.findings:
                console.print(f"  {finding}", markup=False)
    return 1 if any(report.findings for _, report in reports) else 0


def evict(
    url: str,
    nodes: Sequence[str],
    *,
    tenant: str | None,
    prompt: str | None,
    everything: bool,
    pinned: bool,
    credentials: Credentials | None = None,
) -> None:
    if everything == (tenant is not None or prompt is not None):
        raise ConfigError("say what to evict: --all, or --tenant, or --prompt (of a --tenant)")
    keys = None if prompt is None else keys_of(url, {"prompt": prompt, "user": tenant})
    with stores_of(url, nodes, credentials) as stores:
        for store in stores:
            if keys is None:
                blocks = store.admin.evict_all(tenant=tenant, pinned=pinned)
            else:
                blocks = store.admin.evict_prompt(keys, pinned=pinned)
            console.print(f"{store.name} on {store.host}: evicted {blocks:,} blocks")


def drain(
    url: str,
    nodes: Sequence[str],
    host: str,
    *,
    timeout_s: float,
    undo: bool,
    credentials: Credentials | None = None,
) -> int:
    """The exit status: 1 where something is still under way at the end."""
    with stores_of(url, nodes, credentials) as stores:
        chosen = [store for store in stores if host in (store.host, store.name)]
        if not chosen:
            known = ", ".join(f"{store.host} ({store.name})" for store in stores)
            raise ConfigError(f"there is no store {host!r}; there are {known}")
        masters = masters_in(store.admin.report() for store in chosen)
        for store in chosen:
            store.admin.set_draining(not undo)
        if undo:
            console.print(f"{host} takes blocks again")
            return 0
        until_s = time.monotonic() + timeout_s
        for store in chosen:
            move_away(masters, store.admin.store_id, until_s, credentials)
        statuses = [_wait_until_unused(store, until_s) for store in chosen]
    return max(statuses)


def keys_of(url: str, body: dict[str, object]) -> tuple[BlockKey, ...]:
    """Of the full blocks of a prompt; ``body`` as for ``/tokenize``."""
    answer = post_json(url, "/tokenize", {**body, "return_block_keys": True})
    return tuple(BlockKey(bytes.fromhex(key)) for key in answer["block_keys"])


def _wait_until_unused(store: Store, until_s: float) -> int:
    while True:
        stat = store.admin.report().stat
        under_way = {"claims": stat.claims, "writes": stat.writes, "tickets": stat.tickets}
        left = ", ".join(f"{count} {name}" for name, count in under_way.items() if count)
        if not left:
            console.print(
                f"{store.name} on {store.host} is drained: {stat.slots_committed:,} blocks are "
                "cached there and nobody uses them; it may be stopped"
            )
            return 0
        if time.monotonic() >= until_s:
            console.print(
                f"{store.name} on {store.host} takes nothing new, but still has {left}; wait "
                "longer (--timeout-s), or stop the workers that hold them"
            )
            return 1
        time.sleep(POLL_S)


def _plain(store: Store, report: StoreReport) -> dict[str, object]:
    return {"store": store.name, "host": store.host, **asdict(report)}


def _shown(store: Store, report: StoreReport) -> Group:
    stat, counters, pins = report.stat, report.counters, report.pins
    found = counters["blocks_found_memory"] + counters["blocks_found_disk"]
    asked = counters["blocks_asked"]
    mib = report.block_bytes * stat.slots_total / (1 << 20)
    rows = [
        (
            "slots",
            f"{stat.slots_total:,} of {report.block_bytes:,} B ({mib:,.0f} MiB): "
            f"{stat.slots_free:,} free, {stat.slots_committed:,} cached, "
            f"{stat.slots_reserved:,} reserved, {stat.slots_private:,} private, "
            f"{stat.slots_quarantined:,} wrong",
        ),
        ("in use", f"{stat.slots_pinned:,} slots by {stat.claims:,} claims"),
        ("pins", f"{pins['soft']:,} soft, {pins['hard']:,} hard of {pins['hard_max']:,}"),
        ("tickets", f"{stat.tickets:,}, of which {stat.tickets_queued:,} wait for slots"),
        (
            "hits",
            f"{found:,} of {asked:,} blocks asked for ({found / max(1, asked):.1%}), of which "
            f"{counters['blocks_found_disk']:,} waited for the disk; "
            f"{counters['blocks_prefetched']:,} came up ahead",
        ),
        ("evicted", f"{stat.evicted_count:,}; {stat.condemned_count:,} failed their checksum"),
    ]
    if stat.ssd:
        rows.append(("disk", ", ".join(f"{name} {count:,}" for name, count in stat.ssd.items())))
    for use in report.tenants[:TENANTS_SHOWN]:
        rows.append(
            (
                f"tenant {use.tenant or '(none)'}",
                f"{use.slots:,} slots, share {use.share:,}, evicted {use.evicted_count:,}",
            )
        )
    for times in report.phases:
        mean_us = times.sum_ns / times.count / 1000
        rows.append((f"{times.phase}, {times.tier}", f"{times.count:,} × {mean_us:,.0f} µs"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    state = "draining" if report.draining else "up"
    return Group(Text(f"{store.name} on {store.host}, {state}", style="bold"), table, Text())
