"""Where the core sends a request, and until when it lets it wait: modes, placements, deferral."""

from dataclasses import replace
from functools import partial

import pytest

from pdserve.clock import MS, S
from pdserve.ids import WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Dispatch, Request, Resume, Stop
from pdserve.router.core import Command, RouterCore, ToWorker
from pdserve.router.planner import CANDIDATES_MAX
from pdserve.router.worker import HELD_MAX
from tests.unit.router.build import (
    Reporter,
    core_with,
    handoff,
    hello,
    keys,
    request,
    settings,
    told,
)

PATIENCE_NS = 120 * S
"""``queue_age_max_ms``, after which there is something to do in any case."""


def _routes(commands: list[Command]) -> list[str]:
    """Request, prefill and decode worker of each dispatch."""
    return [
        f"{c.message.request.request}: {c.message.route.prefill} to {c.message.route.decode}"
        for c in commands
        if isinstance(c, ToWorker) and isinstance(c.message, Dispatch)
    ]


def _answering(asked: Request, max_tokens: int) -> Request:
    return replace(asked, stop=Stop(max_tokens=max_tokens))


# ── late binding ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tokens", "held"),
    [
        (1000, 1),  # far more than a chunk
        (129, 1),  # more than a chunk
        (128, 2),  # a chunk, and who comes next is there when it is done
        (32, 5),  # four make a chunk
        (1, HELD_MAX),
    ],
)
def test_a_prefill_worker_takes_what_fits_into_one_chunk_and_one_more(
    tokens: int, held: int
) -> None:
    core, _ = core_with(hello("p0", chunk_tokens=128), hello("d0"))
    for index in range(12):
        core.on_submit(request(f"r{index}", tokens), 0)
    assert core.snapshot(0).phases["prefilling"] == held


def test_what_is_cached_or_computed_already_does_not_count_as_held() -> None:
    core, (p0, _) = core_with(hello("p0", chunk_tokens=128), hello("d0"))
    p0.report(blocks_added=keys("a", 60))
    core.on_submit(request("cached", 1000, document="a"), 0)  # but for 40 tokens
    core.on_submit(request("long", 600), 0)
    assert core.on_submit(request("next", 600), 0) == []
    p0.event(request("cached", 1000), Event.PREFILL_DONE)
    for computed_tokens in (128, 256, 384):
        assert p0.chunk(request("long", 600), computed_tokens, 128) == []
    assert told(p0.chunk(request("long", 600), 512, 128)) == [
        "p0 <- dispatch next, decode d0, level 5, queued 0 ms"
    ]


# ── rather wait ──────────────────────────────────────────────────────────────────────────────────


def _one_defers() -> tuple[RouterCore, Reporter, Request]:
    """p1 has 960 tokens of r, and 200 others to compute; p0 is free, but would take 961 ms."""
    core, (p0, p1, _) = core_with(hello("p0"), hello("p1", host="h1"), hello("d0"))
    p1.report(blocks_added=keys("a", 60))
    for name in ("x0", "x1"):
        core.on_submit(request(name, 200), 0)
    p0.event(request("x0", 200), Event.PREFILL_DONE)
    asked = request("r", 961, document="a")
    assert core.on_submit(asked, 0) == []
    return core, p1, asked


def test_who_waits_for_a_better_worker_is_looked_at_again_when_it_has_waited_enough() -> None:
    core, _, _ = _one_defers()
    assert core.next_tick_ns() == 760 * MS  # at p1 it is done after 201, at p0 after 961
    assert core.on_tick(760 * MS) == []
    assert core.next_tick_ns() == 960 * MS  # p1 should be free by now, and would take 1 for 961
    assert core.on_tick(959 * MS) == []
    assert _routes(core.on_tick(960 * MS)) == ["r: p0 to d0"]
    assert core.snapshot(960 * MS).phases["queued"] == 0


def test_it_goes_to_the_better_worker_as_soon_as_that_is_free() -> None:
    _, p1, _ = _one_defers()
    commands = p1.event(request("x1", 200), Event.PREFILL_DONE, now_ns=150 * MS)
    assert _routes(commands) == ["r: p1 to d0"]


def test_however_many_rather_wait_the_next_one_goes() -> None:
    core, _, _ = _one_defers()
    for index in range(2 * CANDIDATES_MAX):
        assert core.on_submit(request(f"r{index}", 961, document="a"), 0) == []
    core.state.check()
    assert core.snapshot(0).phases["queued"] == 2 * CANDIDATES_MAX + 1
    assert sum(core.snapshot(0).queue_lengths) == 2 * CANDIDATES_MAX + 1
    assert _routes(core.on_submit(request("other", 200), 0)) == ["other: p0 to d0"]


def test_what_rather_waits_goes_back_to_where_its_key_puts_it() -> None:
    """Of two alike, who came first."""
    core, p1, _ = _one_defers()
    core.on_submit(request("less", 900, document="a"), 0)
    commands = p1.event(request("x1", 200), Event.PREFILL_DONE, now_ns=150 * MS)
    assert _routes(commands)[0] == "r: p1 to d0"
    core.state.check()


def test_nothing_is_due_once_nobody_has_room_or_it_is_gone() -> None:
    """A tick that is due and does nothing would be due for ever."""
    core, _, asked = _one_defers()
    assert _routes(core.on_submit(request("fills p0", 200), 10 * MS)) == ["fills p0: p0 to d0"]
    core.on_tick(770 * MS)
    far_ns = core.next_tick_ns()
    assert far_ns is not None
    assert far_ns > PATIENCE_NS // 2
    core, _, asked = _one_defers()
    core.on_cancel(asked.request, 0)
    again_ns = core.next_tick_ns()
    assert again_ns is not None
    assert again_ns > PATIENCE_NS // 2


# ── workers that do both ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("placement", ["late", "round_robin", "least_work"])
def test_aggregated_workers_compute_and_decode_what_they_are_given(placement: str) -> None:
    config = replace(settings(), mode="aggregated", placement=placement)  # type: ignore[arg-type]
    core, (_, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"), config=config)
    asked = [request(f"r{index}", 200) for index in range(2)]
    commands = [c for one in asked for c in core.on_submit(one, 0)]
    assert _routes(commands) == ["r0: d0 to d0", "r1: d1 to d1"]
    d0.event(asked[0], Event.PREFILL_DONE)
    d0.event(asked[0], Event.ADOPTED)
    core.state.check()
    assert core.snapshot(0).phases["decoding"] == 1
    d0.event(asked[0], Event.ENDED)
    assert core.snapshot(0).counters["finished"] == 1


def test_aggregated_a_prefill_worker_is_given_nothing() -> None:
    config = replace(settings(), mode="aggregated")
    core, _ = core_with(hello("p0"), config=config)
    assert core.on_submit(request("r", 32), 0) == []
    assert _routes(core.on_hello(hello("d0"), 0)) == ["r: d0 to d0"]


def test_auto_sends_each_where_it_is_done_first() -> None:
    core, _ = core_with(hello("p0"), hello("d0"), config=replace(settings(), mode="auto"))
    # d0 is idle and saves the hand-off; then its stream would be held up; p0 keeps short answers.
    asked = [request("first", 64), request("long", 1000), request("short", 64)]
    assert _routes(core.on_submit(_answering(asked[0], 100), 0)) == ["first: d0 to d0"]
    assert _routes(core.on_submit(_answering(asked[1], 100), 0)) == ["long: p0 to d0"]
    core.on_cancel(asked[1].request, 0)
    assert _routes(core.on_submit(_answering(asked[2], 8), 0)) == ["short: p0 to p0"]


def test_auto_a_parked_stream_goes_on_at_a_decode_worker() -> None:
    config = replace(settings(), mode="auto")
    core, (_, d0) = core_with(hello("p0"), hello("d0"), config=config)
    asked = _answering(request("r", 64), 100)
    assert _routes(core.on_submit(asked, 0)) == ["r: d0 to d0"]
    d0.event(asked, Event.PREFILL_DONE)
    d0.event(asked, Event.ADOPTED)
    d0.report(draining=True)
    assert core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0) == []
    (command,) = core.on_hello(hello("d1"), 0)
    assert isinstance(command, ToWorker)
    assert isinstance(command.message, Resume)
    assert command.worker == "d1"


def test_auto_a_prompt_that_fits_only_where_nobody_decodes_is_refused() -> None:
    config = replace(settings(), mode="auto")
    core, _ = core_with(hello("p0"), hello("d0", block_count=4), config=config)
    (line,) = told(core.on_submit(request("r", 64), 0))
    assert line.startswith("g0 <- refused r/0: This model's maximum context length is 64 tokens")


# ── bound on arrival ─────────────────────────────────────────────────────────────────────────────


def _bound_to_the_first() -> tuple[RouterCore, Reporter, list[Request]]:
    """Two at each of two workers: one it computes, one that waits for it."""
    config = replace(settings(), placement="round_robin")
    core, (p0, _, _) = core_with(hello("p0"), hello("p1"), hello("d0"), config=config)
    asked = [request(f"r{index}", 200) for index in range(4)]
    commands = [c for one in asked for c in core.on_submit(one, 0)]
    assert _routes(commands) == ["r0: p0 to d0", "r1: p1 to d0"]
    return core, p0, asked


def test_who_is_bound_waits_for_that_worker_though_another_is_free() -> None:
    core, _, asked = _bound_to_the_first()
    core.on_cancel(asked[1].request, 0)
    core.on_cancel(asked[3].request, 0)
    assert core.snapshot(0).phases["queued"] == 1
    assert _routes(core.on_cancel(asked[0].request, 0)) == ["r2: p0 to d0"]


@pytest.mark.parametrize("how", ["lost", "draining"])
def test_who_waits_for_a_worker_that_leaves_is_bound_to_another(how: str) -> None:
    core, p0, asked = _bound_to_the_first()
    core.on_cancel(asked[1].request, 0)  # p1 computes r3 now
    core.on_cancel(asked[3].request, 0)  # and now nothing
    leave = {
        "lost": partial(core.on_worker_lost, WorkerId("p0"), 0),
        "draining": partial(p0.report, draining=True),
    }
    assert _routes(leave[how]()) == ["r2: p1 to d0"]


def test_what_a_leaving_worker_hands_back_is_bound_to_another() -> None:
    core, p0, asked = _bound_to_the_first()
    for one in asked[1:]:
        core.on_cancel(one.request, 0)
    assert p0.report(draining=True) == []
    commands = p0.event(asked[0], Event.PREEMPTED)
    assert _routes(commands) == ["r0: p1 to d0"]


def test_while_every_worker_leaves_requests_wait_for_whoever_comes() -> None:
    core, p0, asked = _bound_to_the_first()
    for one in asked:
        core.on_cancel(one.request, 0)
    p0.report(draining=True)
    core.on_worker_lost(WorkerId("p1"), 0, left=True)
    assert core.on_submit(request("r", 32), 0) == []
    assert _routes(core.on_hello(hello("p2"), 0)) == ["r: p2 to d0"]


def test_one_that_came_before_any_worker_is_not_compared_with_those_that_are_bound() -> None:
    """They stand in lines of their own. The first fits into d0 only when that is empty."""
    config = replace(settings(), placement="round_robin")
    core, (d0,) = core_with(hello("d0", block_count=200), config=config)
    d0.report(running=1, free_blocks=120)
    core.on_submit(request("first", 2000), 0)
    core.on_hello(hello("p0"), 0)
    assert told(core.on_submit(request("bound", 1500), 0)) == [
        "p0 <- dispatch bound, decode d0, level 6, queued 0 ms"
    ]


# ── ahead of longer ones ─────────────────────────────────────────────────────────────────────────


def _beside_a_long_one() -> tuple[RouterCore, Reporter]:
    core, (p0, _) = core_with(hello("p0", chunk_tokens=128), hello("d0"), config=settings())
    core.on_submit(request("long", 1500), 0)
    return core, p0


def test_one_that_is_part_of_the_next_chunk_goes_ahead_of_a_long_one() -> None:
    core, _ = _beside_a_long_one()
    assert told(core.on_submit(request("short", 100), 0)) == [
        "p0 <- dispatch short, decode d0, level 2, queued 0 ms, ahead of long"
    ]
    assert told(core.on_submit(request("shorter", 28), 0)) == [
        "p0 <- dispatch shorter, decode d0, level 1, queued 0 ms, ahead of long"
    ]
    assert list(core.state.fleet.at(0).prompts) == ["short", "shorter", "long"]
    assert core.on_submit(request("another", 8), 0) == [], "the next chunk is full"


def test_nobody_goes_ahead_of_one_whose_last_chunk_it_is() -> None:
    core, p0 = _beside_a_long_one()
    p0.chunk(request("long", 1500), 1372, elapsed_ms=0)
    (command,) = told(core.on_submit(request("short", 8), 0))
    assert command.endswith("queued 0 ms"), "it fits beside it"


def test_who_lets_others_go_first_goes_on_when_they_are_done() -> None:
    core, p0 = _beside_a_long_one()
    short = request("short", 100)
    core.on_submit(short, 0)
    assert p0.event(short, Event.PREFILL_DONE) == []
    assert list(core.state.fleet.at(0).prompts) == ["long"]
    assert core.snapshot(0).counters.get("preemptions", 0) == 0


# ── called back ──────────────────────────────────────────────────────────────────────────────────


def test_every_short_one_that_waits_calls_a_long_one_back_at_once() -> None:
    """Decode is full when they come, so that they all wait when room is made."""
    core, (_, _, d0) = core_with(
        hello("p0"), hello("p1"), hello("d0", running_max=2), config=settings()
    )
    for name in ("long0", "long1"):
        core.on_submit(request(name, 1500), 0)
    assert told(core.on_submit(request("short0", 8), 0)) == ["p0 <- preempt long0"]
    assert told(core.on_submit(request("short1", 8), 0)) == ["p1 <- preempt long1"]
    assert d0.report(running=0) == []
    assert core.on_submit(request("short2", 8), 0) == []


def test_a_burst_that_was_held_back_calls_back_as_many_as_it_needs() -> None:
    """While somebody is parked nobody is called back; afterwards both short ones are due."""
    core, (p0, _, d0) = core_with(
        hello("p0"), hello("p1"), hello("d0", block_count=400), config=settings()
    )
    parked = request("parked", 16)
    core.on_submit(parked, 0)
    p0.event(parked, Event.PREFILL_DONE)
    for name in ("long0", "long1"):
        core.on_submit(request(name, 1500), 0)
    d0.report(running=1, free_blocks=0)
    assert core.on_parked(handoff(parked, d0.hello), WorkerId("d0"), 0) == []
    for name in ("short0", "short1"):
        assert core.on_submit(request(name, 8), 0) == []
    assert told(core.on_cancel(parked.request, 0))[2:] == [
        "p0 <- preempt long0",
        "p1 <- preempt long1",
    ]


def test_who_is_rescued_goes_before_the_next_in_line() -> None:
    core, (p0, _) = core_with(
        hello("p0"),
        hello("d0"),
        config=replace(settings(preemption=False), rescue_after_ms=500.0, rescue_ratio=0.1),
    )
    core.on_submit(request("short", 2000), 0)
    assert core.on_submit(request("longer", 6000), 0) == []
    core.on_submit(request("next", 1000), 500 * MS)
    assert core.on_tick(1100 * MS) == []
    (dispatch,) = told(p0.event(request("short", 2000), Event.PREFILL_DONE, now_ns=1200 * MS))
    assert dispatch.startswith("p0 <- dispatch longer")
    assert core.snapshot(1200 * MS).counters["rescues"] == 1


def test_a_ticket_is_freed_where_nobody_leaves() -> None:
    """Who drains might hand it back before it reads that it is to let it go."""
    core, (p0, d0, _) = core_with(hello("p0"), hello("d0"), hello("d1"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    core.on_cancel(asked.request, 0)
    d0.report(draining=True)
    assert told(core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)) == [
        "d1 <- resume r, decode d0",
        "d1 <- cancel r/0",
    ]
