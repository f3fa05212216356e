"""What a worker's death takes with it beyond what the router believes to be there.

Each of these was found by ``tests.simulation``.
"""

from pdserve.clock import S
from pdserve.errors import ErrorInfo
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import Event
from pdserve.messages import Request, WorkerFailed
from pdserve.router.core import RouterCore
from pdserve.router.ended import ENDED_MAX, KEPT_NS, EndedBook
from tests.unit.router.build import (
    Reporter,
    add,
    address,
    core_with,
    handoff,
    hello,
    request,
    settings,
    told,
)


def test_a_request_that_ended_is_lost_with_its_worker_since_its_tokens_may_be_under_way() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.event(asked, Event.ADOPTED)
    d0.event(asked, Event.ENDED)
    assert not core.state.entries
    assert told(core.on_worker_lost(WorkerId("d0"), 0)) == ["g0 <- lost r/0 with d0"]


def test_a_worker_that_could_not_tell_the_gateway_says_so_after_the_end() -> None:
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.event(asked, Event.ADOPTED)
    d0.event(asked, Event.ENDED)
    failed = WorkerFailed(asked.request, 0, ErrorInfo("worker_lost", "x"))
    assert core.on_failed(failed, WorkerId("p0"), 0) == [], "it was not p0's to deliver"
    assert told(core.on_failed(failed, WorkerId("d0"), 0)) == ["g0 <- lost r/0 with d0"]
    assert core.on_failed(failed, WorkerId("d0"), 0) == [], "once"


def test_a_hand_off_is_lost_with_the_worker_that_sent_it_until_decode_has_it() -> None:
    core, (p0, *decodes) = core_with(hello("p0"), hello("d0"), hello("d1"))
    asked, other = request("r", 32), request("s", 32)
    for each in (asked, other):
        core.on_submit(each, 0)
        p0.event(each, Event.PREFILL_DONE)
    adopts = core.state.entries[other.request].decode
    (decode,) = (each for each in decodes if each.hello.worker == adopts)
    decode.event(other, Event.ADOPTED)
    lost = told(core.on_worker_lost(WorkerId("p0"), 0))
    assert "g0 <- lost r/0 with p0" in lost
    assert not any("lost s/0" in line for line in lost)
    core.state.check()


def _resumed_at_d1() -> tuple[RouterCore, Request, Reporter]:
    """Parked at d0, which is open again, and on its way to d1."""
    core, (p0, d0) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    d0.report(draining=True)
    core.on_parked(handoff(asked, d0.hello), WorkerId("d0"), 0)
    d1 = add(core, hello("d1"))
    d0.report()
    core.state.check()
    return core, asked, d1


def test_a_ticket_is_freed_elsewhere_where_its_taker_is_lost_until_that_one_has_adopted_it() -> (
    None
):
    for adopted in (False, True):
        core, asked, d1 = _resumed_at_d1()
        if adopted:
            d1.event(asked, Event.ADOPTED)
        freed = ["d0 <- resume r, decode d0", "d0 <- cancel r/0"]
        assert told(core.on_worker_lost(WorkerId("d1"), 0)) == [
            *([] if adopted else freed),
            "g0 <- lost r/0 with d1",
        ]
        core.state.check()


def test_a_ticket_on_its_way_is_freed_after_its_request_has_ended_if_its_taker_is_lost() -> None:
    for lost_ns, is_freed in ((S, True), (KEPT_NS, False)):
        core, asked, _ = _resumed_at_d1()
        assert told(core.on_cancel(asked.request, 0)) == ["d1 <- cancel r/0"]
        freed = ["d0 <- resume r, decode d0", "d0 <- cancel r/0"]
        assert told(core.on_worker_lost(WorkerId("d1"), lost_ns)) == (freed if is_freed else [])
        assert not core.state.unconfirmed


def test_a_ticket_is_freed_by_who_failed_to_take_it_up_if_nobody_else_can() -> None:
    core, asked, _ = _resumed_at_d1()
    core.on_worker_lost(WorkerId("d0"), 0)
    failed = WorkerFailed(asked.request, 0, ErrorInfo("store_unavailable", "x"))
    commands = told(core.on_failed(failed, WorkerId("d1"), 0))
    assert commands[:2] == ["d1 <- resume r, decode d0", "d1 <- cancel r/0"]
    assert not core.state.orphans


def test_a_worker_that_has_drained_takes_nothing_with_it() -> None:
    """It goes when all it had said has arrived."""
    core, (p0, _) = core_with(hello("p0"), hello("d0"))
    asked = request("r", 32)
    core.on_submit(asked, 0)
    p0.event(asked, Event.PREFILL_DONE)
    p0.report(draining=True)
    assert core.on_worker_lost(WorkerId("p0"), 0) == []
    assert asked.request in core.state.entries


def test_a_worker_taken_for_lost_is_not_known_until_it_says_hello_again() -> None:
    core, _ = core_with(hello("p0"), config=settings(worker_silence_ms=1000))
    assert core.knows(WorkerId("p0"))
    core.on_tick(3600 * S)
    assert not core.knows(WorkerId("p0"))
    core.on_hello(hello("p0"), 3600 * S)
    assert core.knows(WorkerId("p0"))


def test_the_book_forgets_what_is_old_and_what_is_too_much() -> None:
    book, worker, gateway = EndedBook(), WorkerId("d0"), address("g0")
    for number in range(ENDED_MAX + 5):
        book.note(RequestId(f"r{number}"), 0, worker, gateway, 0)
    assert len(book) == ENDED_MAX
    book.note(RequestId("late"), 0, worker, gateway, KEPT_NS)
    assert len(book) == 1
    assert book.worker_lost(WorkerId("d1"), KEPT_NS) == []
    assert len(book.worker_lost(worker, KEPT_NS)) == 1
    assert len(book) == 0
