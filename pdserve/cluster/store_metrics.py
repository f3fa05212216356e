"""The stores' figures for Prometheus, asked of every node when somebody scrapes.

Nodes count (``kvstore.phases``, ``kvstore.operations``), and their clients tell them what they
measured, so nothing is sent while nobody looks. A node that does not answer in time is left out of
that scrape. Series per store are bounded: phases, tiers and states are fixed, and only tenants that
``store.tenant_shares`` names have their own; all others together are ``"*"``.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pdserve.clock import S
from pdserve.cluster.http.processes import text_of
from pdserve.cluster.kv_master import MasterFigures, master_report, masters_in
from pdserve.cluster.kv_stores import addresses_in
from pdserve.errors import PdserveError
from pdserve.kvstore.admin import StoreReport
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.masters.protocol import MasterReport
from pdserve.kvstore.phases import BOUNDS_S
from pdserve.kvstore.security import Credentials
from pdserve.kvstore.shares import ANY_TENANT
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id

ANSWER_S = 1.0
"""For one node; they are asked side by side."""

Reports = Mapping[str, StoreReport]
"""By store."""


async def reports_of(
    snapshot: Mapping[str, Any], credentials: Credentials | None = None
) -> Reports:
    """Of the stores of all workers in a router's snapshot that answer."""
    asked = [asyncio.to_thread(_report, address, credentials) for address in addresses_in(snapshot)]
    answers = await asyncio.gather(*asked)
    return {name: report for answer in answers if answer is not None for name, report in [answer]}


async def master_of(reports: Reports, credentials: Credentials) -> MasterReport | None:
    """What the leading master says; None where there is none, or it does not answer."""
    return await asyncio.to_thread(master_report, masters_in(reports.values()), credentials)


def render(reports: Reports, tenants: Collection[str], master: MasterReport | None = None) -> bytes:
    """The text format. ``tenants``: those with series of their own."""
    registry = CollectorRegistry()
    registry.register(_Figures(reports, tenants))
    if master is not None:
        registry.register(MasterFigures(master))
    nodes = [("store", name, report.counters) for name, report in reports.items()]
    return generate_latest(registry) + text_of(nodes).encode()


def _report(address: Address, credentials: Credentials | None) -> tuple[str, StoreReport] | None:
    try:
        admin = StoreAdmin(
            address, host=local_host_id(), timeout_s=ANSWER_S, credentials=credentials
        )
    except PdserveError:
        return None
    try:
        return admin.store_id, admin.report()
    except PdserveError:
        return None
    finally:
        admin.close()


class _Figures(Collector):
    def __init__(self, reports: Reports, tenants: Collection[str]) -> None:
        self._reports = reports
        self._tenants = tenants

    def collect(self) -> Iterable[Metric]:
        yield self._phases()
        yield self._family(
            GaugeMetricFamily,
            "slots",
            "Slots of the arena",
            "state",
            lambda report: {
                "free": report.stat.slots_free,
                "reserved": report.stat.slots_reserved,
                "committed": report.stat.slots_committed,
                "private": report.stat.slots_private,
                "quarantined": report.stat.slots_quarantined,
            },
        )
        yield self._family(
            GaugeMetricFamily,
            "held",
            "What somebody holds at this moment",
            "kind",
            lambda report: {
                "slots_pinned": report.stat.slots_pinned,
                "claims": report.stat.claims,
                "writes": report.stat.writes,
                "tickets": report.stat.tickets,
                "tickets_queued": report.stat.tickets_queued,
            },
        )
        yield self._family(
            GaugeMetricFamily,
            "pinned_blocks",
            "Blocks that an operator or a request wants kept",
            "kind",
            lambda report: {name: report.pins[name] for name in ("soft", "hard")},
        )
        yield self._family(
            GaugeMetricFamily,
            "tenant_slots",
            "Slots on a tenant's account",
            "tenant",
            self._slots_by_tenant,
        )
        yield self._family(
            CounterMetricFamily,
            "blocks",
            "Blocks by what became of them",
            "outcome",
            lambda report: {
                "asked": report.counters["blocks_asked"],
                "found_memory": report.counters["blocks_found_memory"],
                "found_disk": report.counters["blocks_found_disk"],
                "prefetched": report.counters["blocks_prefetched"],
                "evicted": report.stat.evicted_count,
                "failed_checksum": report.stat.condemned_count,
            },
        )
        yield self._family(
            CounterMetricFamily,
            "disk_operations",
            "Of the tier below, in blocks or prompts",
            "kind",
            lambda report: {
                name: count for name, count in report.stat.ssd.items() if name != "blocks"
            },
        )

    def _phases(self) -> Metric:
        family = HistogramMetricFamily(
            "pdserve_kv_phase_seconds",
            "How long the parts of a store's work take",
            labels=("store", "phase", "tier"),
        )
        for store, report in self._reports.items():
            for times in report.phases:
                bounds = [*map(str, BOUNDS_S), "+Inf"]
                buckets = list(zip(bounds, accumulate(times.counts), strict=True))
                family.add_metric((store, times.phase, times.tier), buckets, times.sum_ns / S)
        return family

    def _family(self, kind: Any, name: str, text: str, label: str, values: Any) -> Metric:
        family: Metric = kind(f"pdserve_kv_{name}", text, labels=("store", label))
        for store, report in self._reports.items():
            for value, count in values(report).items():
                family.add_metric((store, value), count)  # type: ignore[attr-defined]
        return family

    def _slots_by_tenant(self, report: StoreReport) -> Mapping[str, int]:
        sums: Counter[str] = Counter()
        for use in report.tenants:
            sums[use.tenant if use.tenant in self._tenants else ANY_TENANT] += use.slots
        return sums
