"""The stores' figures in Prometheus' format: names, sums, and a bounded number of series."""

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families

from pdserve.cluster.store_metrics import render
from pdserve.kvstore.admin import StoreReport
from pdserve.kvstore.answers import StoreStat
from pdserve.kvstore.operations import COUNTERS
from pdserve.kvstore.phases import PHASES, Phases
from pdserve.kvstore.shares import TenantUse


def report(tenants: int, phases: Phases) -> StoreReport:
    stat = replace(StoreStat(*range(17)), ssd={"blocks": 7, "read": 3})
    return StoreReport(
        block_bytes=4096,
        draining=False,
        stat=stat,
        pins={"soft": 1, "hard": 2, "hard_max": 3},
        tenants=tuple(TenantUse(f't"{i}', 10, 5, 0) for i in range(tenants)),
        counters=dict.fromkeys(COUNTERS, 4),
        phases=phases.times(),
    )


def samples(text: bytes) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_phases_are_histograms_by_tier() -> None:
    phases = Phases()
    for elapsed_us in (10, 11, 30_000_000):
        phases.note(("copy", "memory"), elapsed_us * 1000)
    found = samples(render({"s1": report(0, phases)}, ()))
    name = "pdserve_kv_phase_seconds"
    labels = "copy", "s1", "memory"
    buckets = {key[1]: value for key, value in found.items() if key[0] == f"{name}_bucket"}
    assert (buckets["1e-05"], buckets["2.5e-05"], buckets["10.0"], buckets["+Inf"]) == (1, 2, 2, 3)
    assert found[f"{name}_count", *labels] == 3
    assert found[f"{name}_sum", *labels] == 30.000021


def test_slots_pins_blocks_and_the_disk_are_there_by_store() -> None:
    found = samples(render({"s1": report(0, Phases()), "s2": report(0, Phases())}, ()))
    for store in ("s1", "s2"):
        assert found["pdserve_kv_slots", "free", store] == 1
        assert found["pdserve_kv_pinned_blocks", "hard", store] == 2
        assert found["pdserve_kv_blocks_total", "found_disk", store] == 4
        assert found["pdserve_kv_disk_operations_total", "read", store] == 3


def test_tenants_that_nobody_named_are_one_series() -> None:
    found = samples(render({"s1": report(100, Phases())}, ('t"3',)))
    tenants = {key[2]: value for key, value in found.items() if key[0] == "pdserve_kv_tenant_slots"}
    assert tenants == {'t"3': 10, "*": 990}


def test_what_was_taken_is_not_counted_twice_and_broken_counts_are_refused() -> None:
    phases, node = Phases(), Phases()
    for phase in PHASES:
        phases.note(phase, 1000)
    for times in (*phases.take(), *phases.take()):
        assert node.add(times)
    assert [times.count for times in node.times()] == [1] * len(PHASES)
    good = node.times()[0]
    for bad in (
        good.__class__("sleep", "memory", good.counts, 0),
        good.__class__(good.phase, good.tier, good.counts[1:], 0),
        good.__class__(good.phase, good.tier, (-1, *good.counts[1:]), 0),
        good.__class__(good.phase, good.tier, good.counts, -1),
    ):
        assert not node.add(bad)
