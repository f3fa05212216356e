"""The mover: order, answers instead of exceptions, and what happens when a store goes away."""

import threading
from collections.abc import Callable

import pytest

from pdserve.engine.mover import OFFERED_MAX, Mover
from pdserve.engine.moves import Abort, Adopt, Move, Moved, OpenTicket, Park, Push, Put, Restore
from pdserve.engine.outputs import ToDecode
from pdserve.errors import BlockMissing, OutOfBlocks, StoreUnavailable, TicketGone
from pdserve.ids import BlockId, BlockKey, RequestId, TicketId
from pdserve.messages import Address
from tests.unit.engine.fakes import BLOCK_BYTES, FakePool, FakeStore, address

LOCAL, REMOTE = address("local"), address("remote")
KEYS = tuple(BlockKey(bytes([i]) * 16) for i in range(3))


def blocks(*ids: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(i) for i in ids)


class Parts:
    def __init__(self, *, threaded: bool = False) -> None:
        self.pool = FakePool(8)
        for block, data in enumerate(self.pool.data):
            data[:] = bytes([block]) * BLOCK_BYTES
        self.stores = {LOCAL: FakeStore(), REMOTE: FakeStore()}
        self.connects: list[str] = []
        self.mover = Mover(self.pool, self.connect, LOCAL, threaded=threaded)

    def connect(self, store: Address) -> FakeStore:
        assert store in self.stores
        self.connects.append(store.host)
        return self.stores[store]

    def one(self, move: Move) -> Moved:
        self.mover.submit(move)
        (moved,) = self.mover.collect()
        return moved


def test_the_local_store_is_connected_before_anything_is_asked() -> None:
    assert Parts().connects == ["local"]


def test_put_then_restore_brings_the_bytes_back_up_to_the_first_gap() -> None:
    parts = Parts()
    assert parts.one(Put(LOCAL, KEYS[:2], blocks(1, 2))).count == 2
    moved = parts.one(Restore(LOCAL, KEYS, 0, blocks(5, 6, 7)))
    assert (moved.count, moved.error) == (2, None)
    assert [parts.pool.data[block][0] for block in (5, 6, 7)] == [1, 2, 7]
    parts.stores[LOCAL].check_idle()


def test_restore_starts_where_the_device_has_no_more() -> None:
    parts = Parts()
    parts.one(Put(LOCAL, KEYS, blocks(1, 2, 3)))
    assert parts.one(Restore(LOCAL, KEYS, 1, blocks(5, 6))).count == 2
    assert [parts.pool.data[block][0] for block in (5, 6)] == [2, 3]


def test_a_bad_block_shortens_a_restore() -> None:
    parts = Parts()
    parts.one(Put(LOCAL, KEYS, blocks(1, 2, 3)))
    parts.stores[LOCAL].bad.add(KEYS[1])
    moved = parts.one(Restore(LOCAL, KEYS, 0, blocks(5, 6, 7)))
    assert (moved.count, moved.error) == (1, None)
    assert parts.mover.counters()["checksum_failures"] == 1
    parts.stores[LOCAL].check_idle()


def test_push_tail_and_seal_then_adopt() -> None:
    parts = Parts()
    ticket = parts.one(OpenTicket(REMOTE, RequestId("r"), 0, "d", 3, 10)).ticket
    assert ticket is not None
    parts.one(Push(REMOTE, ticket, KEYS[:1], 0, blocks(1)))
    parts.one(Push(REMOTE, ticket, KEYS[:2], 1, blocks(2), seal=True, tail=BlockId(3)))
    moved = parts.one(Adopt(REMOTE, ticket, (None, *blocks(5, 6))))
    assert moved.error is None
    assert [parts.pool.data[block][0] for block in (5, 6)] == [2, 3]
    parts.stores[REMOTE].check_idle()


def test_a_sealed_push_is_announced_at_once_and_only_then() -> None:
    said: list[ToDecode] = []
    stores = {REMOTE: FakeStore()}
    mover = Mover(
        FakePool(4),
        lambda store: stores.get(store) or FakeStore(),
        LOCAL,
        announce=said.append,
        threaded=False,
    )
    message = ToDecode(REMOTE, "the hand-off")  # type: ignore[arg-type]
    mover.submit(OpenTicket(REMOTE, RequestId("r"), 0, "d", 1, 10))
    ticket = mover.collect()[0].ticket
    assert ticket is not None
    gone = Push(REMOTE, TicketId("gone"), KEYS[:1], 0, blocks(1), seal=True, announce=message)
    mover.submit(gone)
    (failed,) = mover.collect()
    assert (failed.announced, said) == (False, [])
    mover.submit(Push(REMOTE, ticket, KEYS[:1], 0, blocks(1)))
    mover.submit(Push(REMOTE, ticket, KEYS[:1], 1, (), seal=True, announce=message))
    assert [moved.announced for moved in mover.collect()] == [False, True]
    assert said == [message]


def test_adopting_another_number_of_blocks_than_expected_fails() -> None:
    parts = Parts()
    ticket = parts.one(Park(LOCAL, RequestId("r"), 0, KEYS[:1], blocks(1), BlockId(2))).ticket
    assert ticket is not None
    moved = parts.one(Adopt(LOCAL, ticket, blocks(5)))
    assert isinstance(moved.error, BlockMissing)
    parts.stores[LOCAL].check_idle()


def test_a_park_that_fails_leaves_no_ticket() -> None:
    class Full(FakeStore):
        def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None:
            raise OutOfBlocks(1, 0, retry_after_ms=1)

    parts, full = Parts(), Full()
    parts.mover = Mover(parts.pool, lambda _: full, LOCAL, threaded=False)
    moved = parts.one(Park(LOCAL, RequestId("r"), 0, KEYS[:1], blocks(1), BlockId(2)))
    assert isinstance(moved.error, OutOfBlocks)
    full.check_idle()


def test_an_aborted_ticket_is_gone_and_aborting_twice_is_fine() -> None:
    parts = Parts()
    ticket = parts.one(Park(LOCAL, RequestId("r"), 0, KEYS[:1], blocks(1), None)).ticket
    assert ticket is not None
    parts.one(Abort(LOCAL, ticket))
    assert parts.one(Abort(LOCAL, ticket)).error is None
    assert isinstance(parts.one(Adopt(LOCAL, ticket, blocks(5))).error, TicketGone)


def test_a_lost_store_is_an_answer_and_the_next_move_connects_anew() -> None:
    parts = Parts()
    parts.stores[LOCAL].counters["blocks_put"] = 7
    parts.stores[LOCAL].down = True
    moved = parts.one(Put(LOCAL, KEYS, blocks(1, 2, 3)))
    assert isinstance(moved.error, StoreUnavailable)
    parts.stores[LOCAL] = FakeStore()
    assert parts.one(Put(LOCAL, KEYS, blocks(1, 2, 3))).count == 3
    assert parts.connects == ["local", "local"]
    assert parts.mover.counters()["blocks_put"] == 7 + 3


class GatedPool(FakePool):
    """Reading the first block waits until the gate opens."""

    gate = threading.Event()

    def read_block(self, block: int, out: memoryview) -> None:
        assert self.gate.wait(10)
        super().read_block(block, out)


def gated() -> tuple[Mover, FakeStore, threading.Event]:
    store, pool = FakeStore(), GatedPool(8)
    pool.gate = threading.Event()
    return Mover(pool, lambda _: store, LOCAL), store, pool.gate


def test_submitted_moves_go_before_offered_ones() -> None:
    mover, store, gate = gated()
    mover.submit(Put(LOCAL, KEYS[:1], blocks(1)))
    mover.offer(Put(LOCAL, KEYS[:1], blocks(1)))
    mover.submit(Abort(LOCAL, TicketId("t")))
    gate.set()
    mover.close()
    assert list(store.calls) == ["put", "abort", "put", "close"]
    assert len(mover.collect()) == 3


def test_offers_are_refused_when_too_many_wait_and_can_be_taken_back() -> None:
    mover, store, gate = gated()
    mover.submit(Abort(LOCAL, TicketId("t")))
    mover.submit(Put(LOCAL, KEYS[:1], blocks(1)))
    put = Put(LOCAL, KEYS[1:2], blocks(2))
    assert all(mover.offer(put) for _ in range(OFFERED_MAX))
    assert not mover.offer(put)
    assert len(mover.take_back_offered()) == OFFERED_MAX
    gate.set()
    mover.close()
    assert list(store.calls) == ["abort", "put", "close"]


def test_a_bug_on_the_movers_thread_is_told_to_who_collects() -> None:
    woken = threading.Event()

    class Broken(FakeStore):
        def abort(self, ticket: TicketId) -> None:
            raise ZeroDivisionError

    mover = Mover(FakePool(1), lambda _: Broken(), LOCAL)
    mover.wake = woken.set
    mover.submit(Abort(LOCAL, TicketId("t")))
    assert woken.wait(10)
    assert mover.ready()
    with pytest.raises(RuntimeError, match="the mover is dead"):
        mover.collect()
    mover.close()
