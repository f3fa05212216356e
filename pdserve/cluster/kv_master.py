"""The store's masters, as operators see them: for ``pdserve kv`` and for Prometheus.

Where they are the store nodes say, which are what a command or a scrape asks anyway.
"""

import time
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pdserve.errors import StoreError
from pdserve.ids import StoreId
from pdserve.kvstore.admin import StoreReport
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.protocol import MasterReport
from pdserve.kvstore.security import Credentials

console = Console(highlight=False, soft_wrap=True)

NAME = "operator"


def masters_in(reports: Iterable[StoreReport]) -> tuple[str, ...]:
    """Where the masters listen that these nodes know of, each once."""
    return tuple(dict.fromkeys(master for report in reports for master in report.masters))


def master_report(
    masters: Sequence[str], credentials: Credentials | None = None
) -> MasterReport | None:
    """None where there is no master, or none answers."""
    if not masters:
        return None
    client = MasterClient(masters, credentials, name=NAME)
    try:
        return client.report()
    except StoreError:
        return None
    finally:
        client.close()


def show_master(masters: Sequence[str], credentials: Credentials | None = None) -> None:
    if not masters:
        return
    report = master_report(masters, credentials)
    if report is None:
        console.print(f"no master answers at {', '.join(masters)}; the stores go on without")
        return
    if not report.epoch:
        console.print("no master leads just now; the stores go on without")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    index = f"{report.blocks:,} blocks at {report.locations:,} places, {report.index_bytes:,} B"
    if not report.is_whole:
        index += ", not yet whole"
    table.add_row("index", index)
    table.add_row("copied", f"{report.replicas:,} read often, {report.moved:,} off drained nodes")
    table.add_row(
        "refused", f"{report.fenced:,} answers under old epochs, {report.gaps:,} with gaps"
    )
    for member in report.members:
        state = "draining" if member.is_draining else "up" if member.is_in else "not heard yet"
        table.add_row(
            Text(member.store_id),
            Text(
                f"{state}, epoch {member.epoch}, {member.blocks:,} blocks, "
                f"{member.slots_free:,} slots free, on {member.address.host}"
            ),
        )
    leads = f"{report.master} leads under epoch {report.epoch}; {len(report.members)} members"
    console.print(Text(leads, style="bold"))
    console.print(table)


def move_away(
    masters: Sequence[str],
    store_id: StoreId,
    until_s: float,
    credentials: Credentials | None = None,
) -> None:
    """Have what only this node has copied to others, and say what became of it."""
    if not masters:
        return
    client = MasterClient(masters, credentials, name=NAME)
    try:
        vacated = client.vacate(store_id, deadline_s=max(0.001, until_s - time.monotonic()))
    except StoreError as error:
        console.print(f"nothing was copied off {store_id}: {error}")
        return
    finally:
        client.close()
    said = f"{vacated.moved:,} blocks of {store_id} were copied to other hosts"
    if vacated.outweighed:
        said += f"; {vacated.outweighed:,} stay, since what the others have is worth more"
    if left := vacated.left - vacated.outweighed:
        said += f"; {left:,} are there alone, for which there was no room or no time"
    console.print(said)


class MasterFigures(Collector):
    """Of the leading master."""

    def __init__(self, report: MasterReport) -> None:
        self._report = report

    def collect(self) -> Iterable[Metric]:
        report = self._report
        gauges = (
            ("epoch", "Under which the leader leads; 0: nobody does", report.epoch),
            ("members", "Store nodes", len(report.members)),
            ("members_heard", "Those whose inventory is in", sum(m.is_in for m in report.members)),
            ("blocks", "Blocks in the index", report.blocks),
            ("locations", "Places where they are", report.locations),
            ("index_bytes", "Memory of the index", report.index_bytes),
            ("rebuild_seconds", "From the election to a whole index", report.rebuild_ms / 1000),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(f"pdserve_store_master_{name}", text, value=value)
        counters = (
            ("replicated_blocks", "Copied because they were read often", report.replicas),
            ("moved_blocks", "Copied because their node was drained", report.moved),
            ("gaps", "Inventories asked for again", report.gaps),
            ("expelled_members", "Nodes that answered no more", report.removed),
            ("fenced_answers", "Under an old epoch", report.fenced),
        )
        for name, text, value in counters:
            yield CounterMetricFamily(f"pdserve_store_master_{name}", text, value=value)
