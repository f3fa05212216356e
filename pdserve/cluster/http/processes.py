"""What each process of the cluster has of the machine, for Prometheus, under the usual names.

    process_resident_memory_bytes{role="decode",process="decode-1f"} 412876800.0

The gateway speaks of itself (``process`` is its number); workers tell in their reports, routers and
store nodes when they are asked for their figures. A process that is not there has no sample.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from pdserve.vitals import METRICS, Vitals

Process = tuple[str, str, Mapping[str, int]]
"""Role, name, and figures, of which those in ``METRICS`` are told."""

_OWN = Vitals()


def own_process() -> Process:
    return "gateway", str(os.getpid()), _OWN.figures()


def processes_in(snapshot: Mapping[str, Any]) -> Iterator[Process]:
    """Of one router's snapshot, or of several models' as one: workers and who leads them."""
    for worker in snapshot.get("workers", ()):
        yield worker["role"], worker["worker"], worker.get("counters", {})
    routers = [each for each in snapshot.get("models", {}).values() if each] or [snapshot]
    for router in (each.get("router", {}) for each in routers):
        if "pid" in router:
            yield "router", str(router["pid"]), router


def text_of(processes: Iterable[Process]) -> str:
    """The text format."""
    registry = CollectorRegistry()
    registry.register(_Figures(processes))
    return generate_latest(registry).decode()


class _Figures(Collector):
    def __init__(self, processes: Iterable[Process]) -> None:
        self._processes = tuple(processes)

    def collect(self) -> Iterable[Metric]:
        for figure, (name, text) in METRICS.items():
            family = GaugeMetricFamily(name, text, labels=("role", "process"))
            for role, process, figures in self._processes:
                if figure in figures:
                    family.add_metric((role, process), figures[figure])
            yield family
