"""What the autoscaler is shown of the router."""

from dataclasses import replace

from pdserve.clock import S
from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from tests.unit.router.build import core_with, handoff, hello, request, settings


def test_prefill_shows_who_waits_how_long_and_how_much_work_came() -> None:
    core, _ = core_with(hello("p0"), hello("p1"), hello("d0", block_count=400))
    for index in range(4):
        core.on_submit(request(f"r{index}", 600), 0)
    seen = core.observation(2 * S)
    prefill = seen.prefill
    assert (seen.live, seen.arrived, seen.at_ms) == (4, 4, 2000)
    assert (prefill.workers, prefill.busy, prefill.queued) == (2, 2, 2)
    assert (prefill.oldest_wait_ms, prefill.arrived_work_ms) == (2000, 2400)
    assert core.observation(0).prefill.work_ms == 2400, "what runs, and what waits"


def test_decode_shows_what_is_used_and_promised() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0", block_count=100, running_max=8))
    core.on_submit(request("r0", 600), 0)
    decode = core.observation(0).decode
    assert (decode.workers, decode.blocks, decode.sequences) == (1, 38, 1)
    assert (decode.worker_blocks, decode.worker_sequences) == (100, 8)
    assert not decode.is_full
    p0.event(request("r0", 600), Event.PREFILL_DONE)
    d0.event(request("r0", 600), Event.ADOPTED)
    d0.report(free_blocks=50, running=1)
    assert core.observation(0).decode.blocks == 50, "its own reports count now"


def test_what_decode_has_no_room_for_is_demand_of_decode() -> None:
    core, _ = core_with(hello("p0"), hello("d0", block_count=70))
    for index in range(4):
        core.on_submit(request(f"r{index}", 600), 0)
    decode = core.observation(0).decode
    assert decode.is_full
    assert decode.blocks == 4 * 38


def test_the_parked_are_demand_too() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0", block_count=100))
    one = request("r0", 600)
    core.on_submit(one, 0)
    p0.event(one, Event.PREFILL_DONE)
    d0.event(one, Event.ADOPTED)
    d0.report(free_blocks=10, draining=True)
    core.on_parked(handoff(one, d0.hello), WorkerId("d0"), 0)
    decode = core.observation(0).decode
    assert (decode.workers, decode.parked, decode.is_full) == (0, 1, True)
    assert decode.blocks == 90 + 38


def test_nobody_there_is_nobody_shown() -> None:
    core, _ = core_with()
    core.on_submit(request("r", 8), 0)
    seen = core.observation(0)
    assert (seen.live, seen.prefill.workers, seen.decode.workers) == (1, 0, 0)
    assert seen.decode.worker_blocks == 0


def test_in_one_pool_for_both_jobs_all_workers_count_for_both() -> None:
    core, _ = core_with(hello("d0"), hello("d1"), config=replace(settings(), mode="aggregated"))
    seen = core.observation(0)
    assert (seen.prefill.workers, seen.decode.workers) == (2, 2)
    assert (seen.prefill.lent, seen.decode.lent) == (0, 0)
