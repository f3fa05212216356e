from dataclasses import replace

import pytest

from pdserve.clock import MS
from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import ChunkDone, Role
from pdserve.router.core import RouterCore
from pdserve.router.costs import PrefillCost, believed
from pdserve.router.fleet import SLOTS_GROW, Fleet
from pdserve.router.slot_arrays import slots_of
from pdserve.router_config import RouterConfig
from tests.unit.router.build import add, core_with, hello, keys, request, settings, told
from tests.unit.router.entries import COSTS

DOCUMENT = keys("a", 10)


def _blocks(core: RouterCore, worker: str) -> int:
    """Leading blocks of the document that the worker can use."""
    known = core.state.fleet.get(WorkerId(worker))
    assert known is not None
    ((blocks, _),) = core.state.fleet.index.hits(DOCUMENT, 1 << known.slot)
    return blocks


# ── speed ────────────────────────────────────────────────────────────────────────────────────────

CURVED = PrefillCost(fixed_s=0.1, token_s=0.001, pair_s=1e-6)


@pytest.mark.parametrize("begun_tokens", [0, 256])
def test_a_worker_as_fast_as_predicted_is_free_when_predicted(begun_tokens: int) -> None:
    """After each chunk too, of which the first has the fixed part and later ones more attention;
    also where it goes on with a prompt whose first tokens were computed before."""
    costs = replace(believed(1000), prefill=CURVED)
    core = RouterCore(settings(), costs=costs, unix_zero_ms=0)
    p0, _ = add(core, hello("p0")), add(core, hello("d0"))
    asked = request("r", 640)
    core.on_submit(asked, 0)
    if begun_tokens:
        p0.chunk(asked, begun_tokens, 0)  # more than a chunk: its speed says nothing
        p0.event(asked, Event.PREEMPTED, computed_tokens=begun_tokens)
    worker, now_ns = core.state.fleet.at(0), 0
    free_ns = worker.free_at_ns
    assert free_ns == costs.prefill_ns(640 - begun_tokens, begun_tokens)
    for before in range(begun_tokens, 640 - 128, 128):
        elapsed_ns = costs.chunk_ns(128, before, is_first=before == begun_tokens)
        now_ns += elapsed_ns
        chunk = ChunkDone(asked.request, asked.attempt, before + 128, elapsed_ns // 1000)
        p0.report(chunks=(chunk,), now_ns=now_ns)
        assert worker.correction.factor == pytest.approx(1)
        assert worker.free_at_ns == pytest.approx(free_ns, abs=MS)


def test_a_chunk_that_cannot_be_one_is_no_measurement() -> None:
    """640 tokens at once with chunks of 128: its cached prefix was longer than we knew."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 1500)
    core.on_submit(asked, 0)
    p0.chunk(asked, 640, elapsed_ms=10)
    assert core.snapshot(0).prefill_tokens_per_s == 1000
    p0.chunk(asked, 768, elapsed_ms=1280)
    assert core.snapshot(0).prefill_tokens_per_s < 1000


def test_a_worker_is_measured_by_itself_and_the_fleet_by_all() -> None:
    core, (p0, *_) = core_with(hello("p0"), hello("p1"), hello("d0"))
    asked = request("r", 1500)
    core.on_submit(asked, 0)
    p0.chunk(asked, 128, elapsed_ms=256)
    fleet = core.state.fleet
    slow, other = fleet.at(0).correction.factor, fleet.at(1).correction.factor
    assert 1.0 == other < slow == fleet.correction.factor


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────


def test_a_gap_in_the_reports_forgets_the_workers_blocks() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(blocks_added=DOCUMENT)
    assert _blocks(core, "p0") == 10
    p0.report(lost_before=1, blocks_added=DOCUMENT[:2])
    assert _blocks(core, "p0") == 2


def test_a_store_that_is_told_anew_has_what_is_told_from_then_on() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(store_added=DOCUMENT)
    p0.report(store_anew=True)
    assert _blocks(core, "p0") == 0
    p0.report(store_added=DOCUMENT[:3])
    assert _blocks(core, "p0") == 3


def test_a_lost_workers_blocks_are_forgotten_and_its_hosts_store_with_the_last_worker() -> None:
    core, (p0, *_) = core_with(hello("p0"), hello("p1"), hello("d0", host="h1"))
    p0.report(blocks_added=DOCUMENT, store_added=DOCUMENT[:7])
    core.on_worker_lost(WorkerId("p0"), 0)
    assert _blocks(core, "p1") == 7
    core.on_hello(hello("p0"), 0)
    assert _blocks(core, "p0") == 7
    for name in ("p0", "p1"):
        core.on_worker_lost(WorkerId(name), 0)
    core.on_hello(hello("p1"), 0)
    assert _blocks(core, "p1") == 0


@pytest.mark.parametrize(
    ("mode", "in_pool"), [("disaggregated", 0), ("aggregated", 10), ("auto", 10)]
)
def test_what_lies_in_a_decode_workers_pool_counts_where_it_prefills(
    mode: str, in_pool: int
) -> None:
    config = RouterConfig(mode=mode)  # type: ignore[arg-type]
    core, (_, d0) = core_with(hello("p0"), hello("d0"), config=config)
    d0.report(blocks_added=DOCUMENT, store_added=DOCUMENT[:3])
    assert _blocks(core, "d0") == max(in_pool, 3)
    assert _blocks(core, "p0") == 3


def test_another_hosts_store_counts_for_its_own_workers_only() -> None:
    core, (_, p1, _) = core_with(hello("p0"), hello("p1", host="h1"), hello("d0"))
    p1.report(store_added=keys("a", 40))
    assert told(core.on_submit(request("r", 656, document="a"), 0)) == [
        "p1 <- dispatch r, decode d0, level 0, queued 0 ms"
    ]


# ── who is there ─────────────────────────────────────────────────────────────────────────────────


def test_work_that_another_router_sent_counts() -> None:
    """After a restart of the router a worker says that it runs many which nobody here knows."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    p0.report(running=1, waiting=8)
    assert core.on_submit(request("r", 32), 0) == []
    assert told(p0.report(running=1, waiting=7)) == [
        "p0 <- dispatch r, decode d0, level 1, queued 0 ms"
    ]


def test_workers_are_listed_in_the_order_of_their_ids() -> None:
    core, _ = core_with(hello("p1"), hello("d0"), hello("p0"))
    assert [worker.id for worker in core.state.fleet.of(Role.PREFILL)] == ["p0", "p1"]
    assert [worker.worker for worker in core.snapshot(0).workers] == ["d0", "p0", "p1"]


def test_slots_are_used_again_and_grow() -> None:
    fleet = Fleet(settings(), COSTS)
    count = 2 * SLOTS_GROW + 3
    workers = [fleet.add(hello(f"p{number:02}"), 0) for number in range(count)]
    assert [worker.slot for worker in workers] == list(range(count))
    assert fleet.prefill_count == count
    for gone in (20, 5):
        fleet.remove(workers[gone])
    fleet.check()
    assert [fleet.add(hello(f"d{number}"), 0).slot for number in (0, 1)] == [5, 20]
    fleet.check()
    assert fleet.prefill_count == count - 2
    assert [worker.slot for worker in fleet.of(Role.DECODE)] == [5, 20]


def test_the_members_of_a_bit_set_ascend() -> None:
    assert slots_of(1 << 19 | 1 << 8 | 1).tolist() == [0, 8, 19]


def test_the_largest_pool_is_that_of_those_who_decode() -> None:
    fleet = Fleet(settings(), COSTS)
    fleet.add(hello("p0", block_count=9000), 0)
    assert fleet.largest is None
    large = fleet.add(hello("d0", block_count=500), 0)
    fleet.add(hello("d1", block_count=400), 0)
    assert fleet.largest is large.hello
    fleet.remove(large)
    assert fleet.largest is not None
    assert fleet.largest.worker == "d1"


def test_a_worker_is_there_once() -> None:
    fleet = Fleet(settings(), COSTS)
    fleet.add(hello("p0"), 0)
    with pytest.raises(AssertionError, match="p0 is there already"):
        fleet.add(hello("p0"), 0)


@pytest.mark.parametrize(
    ("mode", "prefilling", "decoding"),
    [("disaggregated", "p", "d"), ("aggregated", "d", "d"), ("auto", "pd", "pd")],
)
def test_a_mode_says_who_does_what(mode: str, prefilling: str, decoding: str) -> None:
    fleet = Fleet(RouterConfig(mode=mode), COSTS)  # type: ignore[arg-type]
    for name in ("p0", "d0"):
        worker = fleet.add(hello(name), 0)
        assert worker.prefills == (name[0] in prefilling)
        assert worker.decodes == (name[0] in decoding)


def test_times_of_a_prompt_follow_the_fleets_speed() -> None:
    fleet = Fleet(settings(), COSTS)
    assert fleet.work_ns(100, 50) == 100 * MS
    fleet.correction.observe(10**10, 15 * 10**9)
    assert fleet.work_ns(100, 50) == 150 * MS
