"""Tickets: from the writer's reservation to the reader's claim, and every way out."""

import itertools

import pytest

from pdserve.errors import CapacityError, FrameError, IllegalTransition, OutOfBlocks, TicketGone
from pdserve.ids import RequestId, TicketId
from pdserve.kvstore import tickets as tickets_module
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import (
    ANYBODY,
    TRANSITIONS,
    OwnerId,
    Ticket,
    TicketEvent,
    TicketState,
)
from tests.unit.kvstore.test_core import REQUEST, T1, T2, T3, chain, commit, open_ticket, push, put


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TicketState, TicketEvent)))
def test_every_pair_either_moves_or_is_refused(state: TicketState, event: TicketEvent) -> None:
    ticket = Ticket(
        ticket=T1,
        request=REQUEST,
        attempt=0,
        writer=OwnerId(1),
        reader=ANYBODY,
        block_count=1,
        deadline_ns=0,
        state=state,
    )
    if event in TRANSITIONS[state]:
        ticket.advance(event)
        assert ticket.state is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} while ticket {T1} is {state}"):
            ticket.advance(event)


def test_a_ticket_goes_from_writer_to_reader_with_its_tail() -> None:
    core = StoreCore(4)
    writer, reader = core.connect("p"), core.connect("d")
    keys = chain("a", 2)
    assert open_ticket(core, writer, T1, 3, reader="d")
    push(core, writer, T1, keys[:1])
    push(core, writer, T1, keys, first=1)
    commit(core, writer, core.reserve_tail(writer, T1))
    core.seal(writer, T1)
    core.disconnect(writer)  # from the seal on this does not matter
    grant = core.adopt(reader, T1)
    core.check()
    assert len(grant.slots) == 3
    assert grant.has_tail
    core.release(reader, grant.claim)
    core.check()
    stat = core.stat()
    assert (stat.slots_committed, stat.slots_free, stat.slots_pinned) == (2, 2, 0)
    with pytest.raises(TicketGone, match="adopted before"):
        core.adopt(reader, T1)


def test_blocks_that_are_stored_need_no_slot_of_the_ticket() -> None:
    core = StoreCore(4)
    writer = core.connect("p")
    keys = chain("a", 3)
    put(core, writer, keys[:2])
    assert open_ticket(core, writer, T1, 2)
    grant = core.reserve_push(writer, T1, keys[:2], 0)
    assert grant.slots == ()
    core.check()
    assert core.stat().slots_free == 2
    with pytest.raises(FrameError, match="1 blocks, but the ticket has 0 left"):
        core.reserve_push(writer, T1, keys, 2)


def test_pushed_blocks_are_found_by_others_at_once_and_stay_after_an_abort() -> None:
    core = StoreCore(4)
    writer, other = core.connect("p"), core.connect("x")
    keys = chain("a", 3)
    open_ticket(core, writer, T1, 4)
    push(core, writer, T1, keys)
    assert len(core.claim(other, keys).slots) == 3
    core.abort(T1)
    core.abort(T1)
    core.check()
    assert core.stat().slots_reserved == 0
    assert len(core.claim(other, keys).slots) == 3


def test_while_a_ticket_is_pinned_its_blocks_are_not_evicted() -> None:
    core = StoreCore(3)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 2)
    push(core, writer, T1, chain("a", 2))
    assert put(core, writer, chain("b", 3)) == 1
    core.seal(writer, T1)
    assert put(core, writer, chain("c", 3)) == 1
    core.abort(T1)
    assert put(core, writer, chain("c", 3)) == 3


def test_slots_under_a_pen_stay_the_writers_when_somebody_aborts_the_ticket() -> None:
    """The writer may be copying at this very moment: nobody else may get these slots."""
    core = StoreCore(2)
    writer, reader = core.connect("p"), core.connect("d")
    open_ticket(core, writer, T1, 2, reader="d")
    grant = core.reserve_push(writer, T1, chain("a", 2), 0)
    core.abort(T1)
    core.check()
    assert put(core, reader, chain("b", 2)) == 0, "no slot is free while the writer has them"
    with pytest.raises(TicketGone, match="aborted while its blocks were written"):
        commit(core, writer, grant)
    core.check()
    assert put(core, reader, chain("b", 2)) == 2


def test_a_write_that_fails_gives_its_slots_back_to_the_ticket() -> None:
    core = StoreCore(2)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 2)
    grant = core.reserve_push(writer, T1, chain("a", 2), 0)
    core.abandon(writer, grant.write)
    core.check()
    push(core, writer, T1, chain("a", 2))


def test_one_write_of_blocks_at_a_time_per_ticket() -> None:
    """Its tail may be written beside it: ``test_pieces``."""
    core = StoreCore(4)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 4)
    core.reserve_push(writer, T1, chain("a", 1), 0)
    for step in (
        lambda: core.reserve_push(writer, T1, chain("a", 1), 0),
        lambda: core.seal(writer, T1),
    ):
        with pytest.raises(FrameError, match="neither committed nor over"):
            step()


def test_a_push_continues_where_the_ticket_ends() -> None:
    core = StoreCore(4)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 4)
    with pytest.raises(FrameError, match="from 1 on, but the ticket has 0"):
        core.reserve_push(writer, T1, chain("a", 2), 1)
    commit(core, writer, core.reserve_tail(writer, T1))
    with pytest.raises(FrameError, match="one already"):
        core.reserve_tail(writer, T1)


def test_a_ticket_keeps_the_blocks_whose_parent_was_condemned() -> None:
    core = StoreCore(6)
    writer, reader = core.connect("p"), core.connect("d")
    keys = chain("a", 3)
    put(core, writer, keys[:1])
    claim = core.claim(reader, keys)
    open_ticket(core, writer, T1, 3, reader="d")
    push(core, writer, T1, keys[:1])
    core.condemn(reader, claim.claim, 0)
    push(core, writer, T1, keys, first=1)
    assert put(core, reader, keys) == 3, "somebody stores the prefix anew"
    core.seal(writer, T1)
    grant = core.adopt(reader, T1)
    core.check()
    assert len(grant.slots) == 3
    assert set(grant.slots).isdisjoint(core.claim(reader, keys).slots)
    core.disconnect(reader)
    core.check()
    assert core.stat().slots_committed == 3


def test_a_ticket_whose_first_blocks_are_condemned_does_not_pin_strangers_blocks() -> None:
    core = StoreCore(8)
    writer, reader = core.connect("p"), core.connect("d")
    keys = chain("a", 3)
    put(core, writer, keys[:1])
    claim = core.claim(reader, keys)
    open_ticket(core, writer, T1, 3)
    push(core, writer, T1, keys[:1])
    core.condemn(reader, claim.claim, 0)
    put(core, reader, keys)  # anew, all three
    push(core, writer, T1, keys, first=1)
    core.check()  # the parent of a pinned block is pinned


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────


def test_tickets_wait_their_turn_all_or_nothing() -> None:
    core = StoreCore(4)
    writer = core.connect("p")
    assert open_ticket(core, writer, T1, 3)
    assert not open_ticket(core, writer, T2, 2)
    assert not open_ticket(core, writer, T3, 1), "it would fit, but it came later"
    assert core.stat().slots_free == 1
    core.abort(T1)
    core.check()
    assert core.tickets.take_granted() == [T2, T3]
    assert core.tickets.take_granted() == []


def test_while_a_ticket_waits_puts_get_nothing() -> None:
    core = StoreCore(4)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 3)
    open_ticket(core, writer, T2, 2)
    assert put(core, writer, chain("a", 1)) == 0


@pytest.mark.parametrize("way_out", ["release", "abandon", "seal", "adopted and released"])
def test_whatever_frees_slots_wakes_the_queue(way_out: str) -> None:
    core = StoreCore(2)
    owner = core.connect("d")
    if way_out == "release":
        put(core, owner, chain("a", 2))
        claim = core.claim(owner, chain("a", 2)).claim
    elif way_out == "abandon":
        write = core.reserve(owner, chain("a", 2), 0).write
    else:
        open_ticket(core, owner, T1, 2, reader="d")
        if way_out == "adopted and released":
            push(core, owner, T1, chain("a", 2))
            core.seal(owner, T1)
    assert not open_ticket(core, owner, T2, 2)
    if way_out == "release":
        core.release(owner, claim)
    elif way_out == "abandon":
        core.abandon(owner, write)
    elif way_out == "seal":
        core.seal(owner, T1)
    else:
        core.release(owner, core.adopt(owner, T1).claim)
    core.check()
    assert core.tickets.take_granted() == [T2]


def test_a_wait_ends_at_its_deadline_and_not_before() -> None:
    core = StoreCore(2)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 2)
    open_ticket(core, writer, T2, 2, deadline_ns=50)
    assert core.tickets.next_deadline_ns() == 50
    assert core.tickets.expire(49) == []
    ((ticket, error),) = core.tickets.expire(50)
    assert ticket == T2
    assert isinstance(error, OutOfBlocks)
    assert (error.wanted, error.free) == (2, 0)
    core.abort(T1)
    assert core.tickets.take_granted() == []
    assert core.tickets.next_deadline_ns() is None


def test_who_expires_at_the_head_lets_the_next_one_in() -> None:
    core = StoreCore(3)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 2)
    open_ticket(core, writer, T2, 2, deadline_ns=50)
    open_ticket(core, writer, T3, 1, deadline_ns=99)
    core.tickets.expire(50)
    core.check()
    assert core.tickets.take_granted() == [T3]


def test_a_ticket_that_can_never_fit_is_refused_at_once() -> None:
    core = StoreCore(2)
    writer = core.connect("p")
    with pytest.raises(OutOfBlocks, match="3 blocks wanted, 2 free"):
        open_ticket(core, writer, T1, 3)
    core.check()


def test_tickets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets_module, "TICKETS_MAX", 2)
    core = StoreCore(4)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 4)
    open_ticket(core, writer, T2, 4)
    with pytest.raises(CapacityError, match="2 tickets are under way"):
        open_ticket(core, writer, T3, 4)


# ── whose it is ──────────────────────────────────────────────────────────────────────────────────


def test_a_writer_can_ask_what_would_end_with_it() -> None:
    core = StoreCore(4)
    writer, beside, reader = core.connect("p"), core.connect("p"), core.connect("d")
    open_ticket(core, writer, T1, 1, reader=ANYBODY)
    open_ticket(core, writer, T2, 1, reader="d")
    assert [core.stat(each).tickets_own for each in (writer, beside, reader)] == [2, 2, 0]
    push(core, writer, T2, chain("b", 1))
    core.seal(writer, T2)  # the reader's from now on
    assert core.stat(beside).tickets_own == 1
    push(core, writer, T1, chain("a", 1))
    core.seal(writer, T1)
    assert core.stat(beside).tickets_own == 1, "until somebody has adopted it"
    core.adopt(reader, T1)
    assert core.stat(beside).tickets_own == 0


def test_a_sealed_ticket_dies_with_the_last_connection_of_its_reader() -> None:
    core = StoreCore(2)
    writer = core.connect("p")
    one, two = core.connect("d"), core.connect("d")
    open_ticket(core, writer, T1, 1, reader="d")
    push(core, writer, T1, chain("a", 1))
    core.seal(writer, T1)
    core.disconnect(one)
    assert core.stat().tickets == 1
    core.disconnect(two)
    core.check()
    assert core.stat().tickets == 0
    assert core.stat().slots_pinned == 0


def test_a_ticket_is_not_sealed_for_a_reader_who_is_not_there() -> None:
    core = StoreCore(2)
    writer = core.connect("p")
    open_ticket(core, writer, T1, 1, reader="d")
    with pytest.raises(TicketGone, match="reader d of ticket t-1 is not connected"):
        core.seal(writer, T1)
    core.check()
    assert core.stat().tickets == 0


def test_an_unsealed_ticket_dies_with_its_writer_and_can_not_be_adopted() -> None:
    core = StoreCore(2)
    writer, reader = core.connect("p"), core.connect("d")
    open_ticket(core, writer, T1, 1, reader="d")
    with pytest.raises(TicketGone, match="is open, it can be adopted once sealed"):
        core.adopt(reader, T1)
    core.disconnect(writer)
    with pytest.raises(TicketGone):
        core.adopt(reader, T1)
    assert core.stat().slots_free == 2


@pytest.mark.parametrize("reader", [ANYBODY, ""])
def test_a_ticket_for_anybody_is_its_writers_until_it_is_adopted(reader: str) -> None:
    core = StoreCore(4)
    writer, taker = core.connect("d1"), core.connect("d2")
    for ticket, name in ((T1, "a"), (T2, "b")):
        open_ticket(core, writer, ticket, 1, reader=reader)
        push(core, writer, ticket, chain(name, 1))
        core.seal(writer, ticket)
    claim = core.adopt(taker, T1)
    core.disconnect(writer)
    core.check()
    assert core.claimed(taker, claim.claim, 0)[1].state is SlotState.COMMITTED
    with pytest.raises(TicketGone):
        core.adopt(taker, T2)


def test_strangers_can_neither_write_nor_adopt_a_ticket() -> None:
    core = StoreCore(4)
    writer, reader, stranger = core.connect("p"), core.connect("d"), core.connect("x")
    open_ticket(core, writer, T1, 2, reader="d")
    with pytest.raises(TicketGone, match="not this writer's"):
        core.reserve_push(stranger, T1, chain("a", 1), 0)
    core.seal(writer, T1)
    with pytest.raises(TicketGone, match="is for d, not for x"):
        core.adopt(stranger, T1)
    with pytest.raises(TicketGone, match="is sealed"):
        core.reserve_tail(writer, T1)
    assert core.adopt(reader, T1).slots == ()


def test_a_waiting_writer_that_dies_leaves_the_queue() -> None:
    core = StoreCore(2)
    one, two = core.connect("p1"), core.connect("p2")
    open_ticket(core, one, T1, 2)
    open_ticket(core, two, T2, 2)
    core.disconnect(two)
    core.check()
    core.abort(T1)
    assert core.tickets.take_granted() == []
    assert core.stat().slots_free == 2


def test_an_unknown_ticket_is_gone() -> None:
    core = StoreCore(1)
    owner = core.connect("p")
    unknown = TicketId("t-unknown")
    core.abort(unknown)
    for step in (
        lambda: core.seal(owner, unknown),
        lambda: core.adopt(owner, unknown),
        lambda: core.reserve_tail(owner, unknown),
        lambda: core.reserve_push(owner, unknown, chain("a", 1), 0),
    ):
        with pytest.raises(TicketGone):
            step()


def test_a_reader_that_was_never_told_ends_what_was_sealed_for_it() -> None:
    """The writer died between the seal and its word to the reader."""
    core = StoreCore(4)
    writer, reader, other = core.connect("p"), core.connect("d"), core.connect("e")
    assert open_ticket(core, writer, T1, 2, reader="d", attempt=1)
    push(core, writer, T1, chain("a", 2))
    core.seal(writer, T1)
    core.disconnect(writer)
    for who, request, attempt in (
        (other, REQUEST, 1),
        (reader, RequestId("another"), 1),
        (reader, REQUEST, 0),
    ):
        core.abort_attempts(who, request, attempt)
        assert core.stat().tickets == 1
    core.abort_attempts(reader, REQUEST, 1)
    core.check()
    stat = core.stat()
    assert (stat.tickets, stat.slots_pinned, stat.slots_committed) == (0, 0, 2)


def test_a_later_attempt_ends_the_tickets_of_earlier_ones() -> None:
    core = StoreCore(4)
    writer, reader, successor = core.connect("p"), core.connect("d"), core.connect("p2")
    assert open_ticket(core, writer, T1, 2, reader="d")
    push(core, writer, T1, chain("a", 2))
    core.seal(writer, T1)
    assert open_ticket(core, successor, T2, 4, reader="d", attempt=1), "nothing else is pinned"
    with pytest.raises(TicketGone):
        core.adopt(reader, T1)
