"""What the golden traces do not show: refusals, repetitions, and the limits of each rule."""

import dataclasses
import json
from dataclasses import replace

import pytest

from pdserve.clock import MS
from pdserve.errors import ErrorInfo
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, FetchAhead, Refused, Report, Resume, WorkerFailed
from pdserve.router import deadlines, planner
from pdserve.router.core import GATEWAY_GRACE_NS, RouterCore, ToGateway, ToWorker
from pdserve.router.costs import PrefillCost, believed
from pdserve.router_config import RouterConfig
from tests.unit.router.build import (
    add,
    address,
    core_with,
    handoff,
    hello,
    keys,
    request,
    settings,
    told,
)


def _occupied(core: RouterCore) -> None:
    """One chunk to compute, and one to come: a prefill worker takes no more."""
    for name in ("first", "second"):
        core.on_submit(request(name, 128), 0)


# ── routes ───────────────────────────────────────────────────────────────────────────────────────


def test_the_route_says_where_blocks_and_tokens_go() -> None:
    core, _ = core_with(hello("p0"), hello("d0", host="h1"))
    (command,) = core.on_submit(request("r", 32), 0)
    assert isinstance(command, ToWorker)
    assert isinstance(command.message, Dispatch)
    route = command.message.route
    assert (route.prefill, route.decode) == ("p0", "d0")
    assert (route.decode_address, route.decode_store) == (
        address("d0", "h1"),
        address("store", "h1"),
    )


def test_the_timing_adds_up_all_waits_and_all_stretches() -> None:
    core = RouterCore(settings(), unix_zero_ms=5000)
    p0 = add(core, hello("p0"))
    asked = request("r", 640)
    core.on_submit(asked, 10 * MS)
    add(core, hello("d0"), now_ns=30 * MS)  # dispatched: it waited 20 ms
    core.on_submit(request("other", 100), 40 * MS)
    core.on_submit(request("another", 100), 40 * MS)
    p0.event(asked, Event.PREEMPTED, computed_tokens=128, now_ns=100 * MS)
    (command,) = p0.event(request("other", 100), Event.PREFILL_DONE, now_ns=105 * MS)
    assert isinstance(command.message, Dispatch)
    timing = command.message.timing
    assert timing.queued_us == 25_000
    assert timing.prefill_us == 70_000
    assert timing.since_unix_us == 5_105_000
    assert timing.preempted_count == 1


def test_both_ends_agree_on_what_a_block_is() -> None:
    core, _ = core_with(hello("p0"), replace(hello("d0"), namespace="ff"))
    assert core.on_submit(request("r", 32), 0) == []


def test_the_store_hears_of_a_prompt_that_waits_and_not_of_one_that_goes_on() -> None:
    core, (p0, _) = core_with(hello("p0", disk=True), hello("d0"))
    asked = request("r", 64, document="talk")
    p0.report(store_added=asked.block_keys[:3])
    (command,) = core.on_submit(asked, 0)
    assert isinstance(command.message, Dispatch)
    _occupied(core)
    later = request("s", 64, document="talk", tenant="acme")
    ahead = FetchAhead(asked.block_keys[:3], "acme")
    assert core.on_submit(later, 0)[-1] == ToWorker(WorkerId("p0"), ahead)
    strange = core.on_submit(request("t", 64), 0)  # nobody has anything of it
    assert not any(isinstance(command.message, FetchAhead) for command in strange)


def test_where_no_store_has_a_disk_nothing_is_fetched_ahead() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    _occupied(core)
    asked = request("r", 64)
    p0.report(store_added=asked.block_keys)
    commands = core.on_submit(asked, 0)
    assert not any(isinstance(command.message, FetchAhead) for command in commands)


def test_a_resumed_request_has_the_route_to_its_new_decode_worker() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.report(draining=True)
    core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)
    (command,) = core.on_hello(hello("d1", host="h1"), 0)
    assert isinstance(command, ToWorker)
    assert isinstance(command.message, Resume)
    resumed = command.message.handoff
    assert resumed.route.decode == "d1"
    assert resumed.route.decode_store == address("store", "h1")
    assert resumed.store == address("store", "h0")  # its blocks are where they were


# ── admission ────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_refuses_and_says_when_to_try_again() -> None:
    """D11: two wait with 640 ms of work each, one worker: 1,280 ms."""
    core, _ = core_with(hello("p0"), hello("d0"), config=settings(waiting_max=2))
    _occupied(core)
    for name in ("r1", "r2"):
        assert core.on_submit(request(name, 640), 0) == []
    (command,) = core.on_submit(request("r3", 640), 0)
    assert isinstance(command.message, Refused)
    error = command.message.error
    assert (error.kind, error.retry_after_ms) == ("queue_full", 1280)


def test_a_second_attempt_is_not_turned_away_by_a_full_queue() -> None:
    core, _ = core_with(hello("p0"), hello("d0"), config=settings(waiting_max=1))
    _occupied(core)
    core.on_submit(request("r1", 64), 0)
    assert core.on_submit(request("r2", 64, attempt=1), 0) == []
    assert core.snapshot(0).phases["queued"] == 2


def test_a_request_sent_again_is_taken_once() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("r", 32), 0)
    assert core.on_submit(request("r", 32), 0) == []
    assert core.snapshot(0).counters["stale_submits"] == 1


def test_a_later_attempt_replaces_an_earlier_one() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("r", 32), 0)
    assert told(core.on_submit(request("r", 40, prompt_tokens=32, attempt=1), 0)) == [
        "p0 <- cancel r/0",
        "d0 <- cancel r/0",
        "p0 <- dispatch r, decode d0, level 1, queued 0 ms",
    ]
    p0.event(request("r", 32), Event.PREFILL_DONE)  # of the old attempt
    assert core.snapshot(0).phases["prefilling"] == 1
    assert core.on_submit(request("r", 32), 0) == []


def test_a_prompt_that_no_decode_worker_can_hold_is_the_clients_mistake() -> None:
    core, _ = core_with(hello("p0"), hello("d0", block_count=4))
    (command,) = core.on_submit(request("r", 64), 0)
    assert isinstance(command.message, Refused)
    assert command.message.error.kind == "context_length_exceeded"
    assert told(core.on_submit(request("r2", 63), 0)) == [
        "p0 <- dispatch r2, decode d0, level 2, queued 0 ms"
    ]


def test_a_parked_request_that_outgrew_every_worker_is_refused() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0", block_count=4))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    parked = handoff(asked, d0.hello, tokens=64)
    commands = core.on_parked(parked, WorkerId("d0"), 0)
    refused = commands[-1].message
    assert isinstance(refused, Refused)
    assert refused.error.kind == "out_of_blocks"
    # Its ticket is freed by whoever takes it up and is stopped.
    assert told(commands)[:-1] == ["d0 <- resume r, decode d0", "d0 <- cancel r/0"]


def test_a_parked_attempt_that_nobody_will_resume_is_freed_around_a_later_one() -> None:
    core, (_, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    core.on_submit(request("r", 32, attempt=1), 0)  # again by way of d0
    parked = handoff(asked, d0.hello)
    assert told(core.on_parked(parked, WorkerId("d0"), 0)) == [
        "d1 <- resume r, decode d0",
        "d1 <- cancel r/0",
    ]


def test_without_workers_requests_wait() -> None:
    core, _ = core_with()
    assert core.on_submit(request("r", 10_000), 0) == []
    add(core, hello("d0"))
    assert told(core.on_hello(hello("p0"), 0)) == [
        "p0 <- dispatch r, decode d0, level 7, queued 0 ms"
    ]


# ── late binding, room ───────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_fits_nowhere_lets_smaller_ones_pass_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """D10. With one running there, d0 has 13 blocks: 11 and 2 to grow fit, 13 and 2 do not."""
    monkeypatch.setattr(planner, "PASSED_OVER_MAX", 2)
    core, (p0, d0) = core_with(hello("p0", chunk_tokens=256), hello("d0", block_count=30))
    d0.report(running=1, free_blocks=13)
    assert core.on_submit(request("large", 200), 0) == []
    small = [request(f"s{index}", 170, max_tokens=1) for index in range(3)]
    for asked in small[:2]:
        assert told(core.on_submit(asked, 0)) == [
            f"p0 <- dispatch {asked.request}, decode d0, level 3, queued 0 ms"
        ]
        p0.event(asked, Event.ENDED)
    assert core.on_submit(small[2], 0) == []
    commands = d0.report(running=0, free_blocks=30)
    assert [line.split(",")[0] for line in told(commands)] == [
        "p0 <- dispatch large",
        "p0 <- dispatch s2",
    ]


def test_reservations_are_for_the_prompt_and_not_for_the_longest_answer() -> None:
    core, _ = core_with(hello("p0"), hello("p1"), hello("p2"), hello("d0", block_count=30))
    for name in ("r1", "r2", "r3"):
        core.on_submit(request(name, 64, max_tokens=10_000), 0)
    (d0,) = [worker for worker in core.snapshot(0).workers if worker.role == "decode"]
    assert (d0.held, d0.reserved_blocks) == (3, 15)


def test_a_finished_request_gives_its_reservation_back() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 64)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.event(asked, Event.ADOPTED)
    d0.event(asked, Event.ENDED)
    core.state.check()
    assert all(w.held == w.reserved_blocks == 0 for w in core.snapshot(0).workers)


# ── events that come late, twice, or from nowhere ────────────────────────────────────────────────


def test_decode_may_speak_before_prefill_does() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    d0.event(asked, Event.ADOPTED)
    assert core.snapshot(0).phases["decoding"] == 1
    p0.event(asked, Event.PREFILL_DONE)
    d0.event(asked, Event.ENDED)
    core.state.check()
    counters = core.snapshot(0).counters
    assert (counters["finished"], counters["stale_events"]) == (1, 1)


def test_decode_may_be_done_before_prefill_says_that_it_is() -> None:
    core, (_, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    d0.event(asked, Event.ENDED)
    assert core.snapshot(0).counters["finished"] == 1


@pytest.mark.parametrize("event", list(Event))
@pytest.mark.parametrize("worker", ["p0", "d0"])
def test_no_event_of_no_worker_about_no_request_is_an_error(event: Event, worker: str) -> None:
    core, reporters = core_with(hello("p0"), hello("d0"))
    (reporter,) = [r for r in reporters if r.hello.worker == worker]
    waiting, running = request("waiting", 64), request("running", 64)
    core.on_submit(running, 0)
    for asked in (waiting, running, replace(running, attempt=7), request("unknown", 8)):
        reporter.event(asked, event)
        core.state.check()


def test_unknown_workers_are_not_heard() -> None:
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    stranger = WorkerId("p9")
    failed = WorkerFailed(asked.request, 0, ErrorInfo("store", "x"))
    assert core.on_report(Report(stranger, 0, False, 0, 0, 0), 0) == []
    assert core.on_failed(failed, stranger, 0) == []
    assert core.on_parked(handoff(asked, p0.hello), stranger, 0) == []
    assert core.on_worker_lost(stranger, 0) == []
    assert core.on_failed(replace(failed, attempt=3), WorkerId("p0"), 0) == []
    assert core.on_cancel(RequestId("unknown"), 0) == []
    assert core.snapshot(0).counters["stale_events"] == 4


def test_a_late_word_of_an_old_attempt_stops_that_attempt_and_no_other() -> None:
    core, (_, d0) = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("r", 32), 0)
    core.on_submit(request("r", 32, attempt=1), 0)
    assert told(d0.event(request("r", 32), Event.ADOPTED)) == ["d0 <- cancel r/0"]
    assert core.snapshot(0).phases["prefilling"] == 1


def test_an_attempt_that_the_router_never_knew_is_stopped() -> None:
    """A predecessor gave it out, and died."""
    _, (_, d0) = core_with(hello("p0"), hello("d0"))
    assert told(d0.event(request("r", 32), Event.ADOPTED)) == ["d0 <- cancel r/0"]
    assert d0.event(request("r", 32), Event.ENDED) == []


def test_a_worker_that_drains_is_told_when_nothing_is_bound_to_it() -> None:
    core, (p0, d0, d1) = core_with(hello("p0"), hello("d0"), hello("d1"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    assert d0.report(draining=True) == []
    p0.event(asked, Event.PREFILL_DONE)
    assert d0.event(asked, Event.ADOPTED) == []
    resumed = core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)
    assert told(resumed) == ["d1 <- resume r, decode d1"]
    assert told(d0.report()) == ["d0 <- goodbye"]
    assert d1.report() == []


def test_a_ticket_waits_for_the_next_decode_worker_to_free_it() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("p1"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.report(draining=True)
    core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)
    core.on_worker_lost(WorkerId("d0"), 0, left=True)
    assert core.on_cancel(asked.request, 0) == []
    assert core.on_hello(hello("p2"), 0) == []
    freed = ["d1 <- resume r, decode d0", "d1 <- cancel r/0"]
    assert told(core.on_hello(hello("d1"), 0)) == freed
    assert core.on_hello(hello("d2"), 0) == []


# ── losses and time ──────────────────────────────────────────────────────────────────────────────


def test_a_parked_request_is_lost_with_the_last_worker_of_its_store() -> None:
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0", host="h1"), hello("p1", host="h1"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.report(draining=True)
    core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)
    assert core.on_worker_lost(WorkerId("d0"), 0, left=True) == []
    assert told(core.on_worker_lost(WorkerId("p1"), 0)) == ["g0 <- lost r/0 with d0"]


def test_the_next_tick_is_the_first_thing_that_can_be_due() -> None:
    core, _ = core_with(config=settings(worker_silence_ms=1000))
    assert core.next_tick_ns() is None
    core.on_submit(request("r", 8, deadline_ms=5000), 0)
    assert core.next_tick_ns() == 5000 * MS
    core.on_hello(hello("p0"), 200 * MS)
    assert core.next_tick_ns() == 1200 * MS
    core.on_tick(1200 * MS)
    core.on_cancel(RequestId("r"), 1200 * MS)
    assert core.next_tick_ns() is None
    core.on_gateway_lost(address("g0"), 0)
    assert core.next_tick_ns() == GATEWAY_GRACE_NS


def test_a_gateway_that_submits_is_back() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    core.on_submit(request("r1", 32), 0)
    core.on_gateway_lost(address("g0"), 0)
    core.on_submit(request("r2", 32), 0)
    assert core.on_tick(GATEWAY_GRACE_NS) == []
    assert core.snapshot(0).phases["prefilling"] == 2


def test_a_deadline_counts_from_the_wall_time_that_was_given() -> None:
    core = RouterCore(settings(), unix_zero_ms=1000)
    core.on_submit(request("r", 8, deadline_ms=1500), 0)
    assert core.on_tick(500 * MS - 1) == []
    (command,) = core.on_tick(500 * MS)
    assert isinstance(command, ToGateway)
    assert isinstance(command.message, Refused)
    assert command.message.error.kind == "deadline_exceeded"


def test_deadlines_of_finished_requests_do_not_pile_up() -> None:
    core, _ = core_with()
    for index in range(500):
        core.on_submit(request(f"r{index}", 8), 0)
        core.on_cancel(RequestId(f"r{index}"), 0)
    assert len(core.state.deadlines) <= deadlines.DEAD_DEADLINES_MAX


def test_a_snapshot_is_plain_values() -> None:
    core, _ = core_with(hello("p0"), hello("d0"))
    for name in ("r1", "r2", "r3"):
        core.on_submit(request(name, 100), 0)
    snapshot = core.snapshot(70 * MS)
    assert json.loads(json.dumps(dataclasses.asdict(snapshot)))["oldest_wait_ms"] == 70
    assert snapshot.oldest_request == "r3"
    assert snapshot.queue_lengths == (0, 0, 1, 0, 0, 0, 0, 0)
    assert snapshot.queued_work_ms == 100


# ── predictions ──────────────────────────────────────────────────────────────────────────────────


def test_chunks_that_take_what_was_predicted_of_the_whole_correct_nothing() -> None:
    """What is fixed about a prefill was predicted once, however many chunks it has."""
    prefill = PrefillCost(fixed_s=0.1, token_s=0.001)
    costs = replace(believed(1000), origin="measured", prefill=prefill)
    core = RouterCore(settings(), unix_zero_ms=0, costs=costs)
    p0 = add(core, hello("p0", chunk_tokens=128))
    add(core, hello("d0"))
    for number in range(20):
        asked = request(f"r{number}", 640)
        core.on_submit(asked, 0)
        p0.chunk(asked, 128, elapsed_ms=100 + 128)
        for computed in (256, 384, 512):
            p0.chunk(asked, computed, elapsed_ms=128)
        p0.event(asked, Event.PREFILL_DONE)
    assert core.state.fleet.correction.factor == pytest.approx(1.0)


def test_shadows_hear_that_who_waits_has_less_to_do() -> None:
    core = RouterCore(RouterConfig(prefill_tokens_per_s=1000), unix_zero_ms=0)
    p0 = add(core, hello("p0", chunk_tokens=128))
    add(core, hello("d0"))
    _occupied(core)
    core.on_submit(request("waits", 640, document="a"), 0)
    entry = core.state.entries[RequestId("waits")]
    job = entry.shadow_job
    assert job is not None
    assert job.work_ns == 640 * MS
    p0.report(blocks_added=keys("a", 20))
    assert job.work_ns == entry.work_ns == 320 * MS
    for name in ("first", "second"):
        p0.event(request(name, 128), Event.PREFILL_DONE)
    assert entry.shadow_job is None, "called back, what was done of it would be no less to do"
