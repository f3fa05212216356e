import pytest

from pdserve.clock import MS
from pdserve.ids import WorkerId
from pdserve.messages import Role
from pdserve.router.fleet import RATE_MEMORY_TOKENS, PrefillRate
from tests.unit.router.build import core_with, hello, keys, request, told

DOCUMENT = keys("a", 10)


def test_the_configured_rate_is_believed_until_something_is_measured() -> None:
    assert PrefillRate(1000).work_ns(250) == 250 * MS


def test_measurements_outweigh_the_configured_rate() -> None:
    rate = PrefillRate(1000)
    for _ in range(50):
        rate.observe(512, elapsed_us=1_024_000)
    assert rate.tokens_per_s == pytest.approx(500, rel=0.01)


def test_a_chunk_larger_than_the_memory_is_all_there_is() -> None:
    rate = PrefillRate(1000)
    rate.observe(2 * RATE_MEMORY_TOKENS, elapsed_us=RATE_MEMORY_TOKENS * 1000)
    assert rate.tokens_per_s == pytest.approx(2000)


def test_a_chunk_that_cannot_be_one_is_no_measurement() -> None:
    """640 tokens at once with chunks of 128: its cached prefix was longer than we knew."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 1500)
    core.on_submit(asked, 0)
    p0.chunk(asked, 640, elapsed_ms=10)
    assert core.snapshot(0).prefill_tokens_per_s == 1000
    p0.chunk(asked, 768, elapsed_ms=1280)
    assert core.snapshot(0).prefill_tokens_per_s < 1000


def test_a_gap_in_the_reports_forgets_the_workers_blocks() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(blocks_added=DOCUMENT)
    index = core.state.fleet.index
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 10
    p0.report(lost_before=1, blocks_added=DOCUMENT[:2])
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 2


def test_a_lost_workers_blocks_are_forgotten_and_its_hosts_store_with_the_last_worker() -> None:
    core, (p0, *_) = core_with(hello("p0"), hello("p1"), hello("d0", host="h1"))
    p0.report(blocks_added=DOCUMENT, store_added=DOCUMENT)
    index = core.state.fleet.index
    core.on_worker_lost(WorkerId("p0"), 0)
    assert index.prefix_blocks(DOCUMENT, ["p0"]) == 0
    assert index.prefix_blocks(DOCUMENT, ["store-h0"]) == 10
    core.on_worker_lost(WorkerId("p1"), 0)
    assert index.prefix_blocks(DOCUMENT, ["store-h0"]) == 0


def test_what_lies_in_a_decode_workers_pool_is_nothing_to_prefill() -> None:
    core, (_, d0) = core_with(hello("p0"), hello("d0"))
    d0.report(blocks_added=DOCUMENT, store_added=DOCUMENT[:3])
    assert core.state.fleet.index.prefix_blocks(DOCUMENT, ["d0"]) == 0
    assert core.state.fleet.index.prefix_blocks(DOCUMENT, ["store-h0"]) == 3


def test_another_hosts_store_counts_for_its_own_workers_only() -> None:
    core, (_, p1, _) = core_with(hello("p0"), hello("p1", host="h1"), hello("d0"))
    p1.report(store_added=keys("a", 40))
    assert told(core.on_submit(request("r", 656, document="a"), 0)) == [
        "p1 <- dispatch r, decode d0, level 0, queued 0 ms"
    ]


def test_work_that_another_router_sent_counts() -> None:
    """After a restart of the router a worker says that it runs two which nobody here knows."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(running=1, waiting=1)
    assert core.on_submit(request("r", 32), 0) == []
    assert told(p0.report(running=1, waiting=0)) == [
        "p0 <- dispatch r, decode d0, level 1, queued 0 ms"
    ]


def test_workers_are_listed_in_the_order_of_their_ids() -> None:
    core, _ = core_with(hello("p1"), hello("d0"), hello("p0"))
    assert [worker.id for worker in core.state.fleet.of(Role.PREFILL)] == ["p0", "p1"]
    assert [worker.worker for worker in core.snapshot(0).workers] == ["d0", "p0", "p1"]
