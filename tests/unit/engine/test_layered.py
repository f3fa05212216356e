"""Pushes that begin while their blocks are computed: what arrives, and every way out."""

from dataclasses import replace

import pytest

from pdserve.engine.mover import Mover
from pdserve.engine.moves import Abort, Forsake, Moved, OpenTicket, Push, PushLayers
from pdserve.errors import OutOfBlocks
from pdserve.ids import BlockId, BlockKey, RequestId, TicketId
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt
from tests.unit.engine.fakes import (
    BLOCK_BYTES,
    LAYER_BYTES,
    LAYER_COUNT,
    FakePool,
    FakeStore,
    address,
)
from tests.unit.engine.rig import Rig, plain, prompt, request

STORE = address("store")
KEYS = tuple(BlockKey(bytes([i]) * 16) for i in range(3))
BLOCKS = (BlockId(1), BlockId(2))
TAIL = BlockId(3)


class Parts:
    def __init__(self) -> None:
        self.pool, self.store = FakePool(8), FakeStore()
        self.mover = Mover(self.pool, lambda _: self.store, STORE, threaded=False)
        self.compute(0, b"stale")
        self.compute(1, b"stale")
        ticket = self.one(OpenTicket(STORE, RequestId("r"), 0, "d", 3, 10)).ticket
        assert ticket is not None
        self.ticket = ticket

    def compute(self, layer: int, word: bytes = b"right") -> None:
        for block, data in enumerate(self.pool.data):
            content = bytes([block]) + word * LAYER_BYTES
            data[layer * LAYER_BYTES : (layer + 1) * LAYER_BYTES] = content[:LAYER_BYTES]

    def one(self, move: OpenTicket | Push | PushLayers | Abort | Forsake) -> Moved:
        self.mover.submit(move)
        (moved,) = self.mover.collect()
        return moved

    def layers(self, count: int, **changed: object) -> PushLayers:
        move = PushLayers(
            STORE, RequestId("r"), 0, KEYS[:2], 0, BLOCKS, TAIL, layers=count, done=None
        )
        return replace(move, **changed)  # type: ignore[arg-type]

    def push(self, **changed: object) -> Push:
        move = Push(STORE, self.ticket, KEYS[:2], 0, BLOCKS, seal=True, tail=TAIL)
        return replace(move, **changed)  # type: ignore[arg-type]

    def stored(self) -> list[bytes]:
        record = self.store.tickets[self.ticket]
        assert record.sealed
        assert record.tail is not None
        return [*(self.store.blocks[key] for key in record.keys), record.tail]


def test_layers_are_copied_as_they_are_told_and_committed_by_the_push() -> None:
    parts = Parts()
    parts.compute(0)
    assert parts.one(parts.layers(1)).error is None
    parts.compute(0, b"later")  # nobody reads it a second time
    parts.compute(1)
    assert parts.store.blocks == {}, "nothing can be found before the push"
    assert parts.one(parts.push()).error is None
    expected = Parts()
    expected.compute(0)
    expected.compute(1)
    assert parts.stored() == [bytes(expected.pool.data[block]) for block in (*BLOCKS, TAIL)]
    assert parts.store.finished == 2
    assert not parts.store.writes


@pytest.mark.parametrize("told", [(1, LAYER_COUNT), (LAYER_COUNT, 1), (1, 1), (LAYER_COUNT,)])
def test_however_often_layers_are_told_each_is_copied_once(told: tuple[int, ...]) -> None:
    parts = Parts()
    parts.compute(0)
    parts.compute(1)
    for count in told:
        parts.one(parts.layers(count))
    parts.one(parts.push())
    assert parts.stored() == [bytes(parts.pool.data[block]) for block in (*BLOCKS, TAIL)]


def test_another_push_than_was_begun_is_made_whole() -> None:
    parts = Parts()
    parts.one(parts.layers(1, tail=None))
    parts.one(parts.push())
    assert (parts.store.finished, parts.store.writes) == (0, [])
    assert parts.stored() == [bytes(parts.pool.data[block]) for block in (*BLOCKS, TAIL)]


def test_a_store_that_takes_no_pieces_gets_whole_blocks() -> None:
    parts = Parts()
    parts.store.takes_pieces = False
    parts.one(parts.layers(1))
    parts.one(parts.layers(2))
    assert parts.store.calls.count("begin_push") == 1, "it is asked once"
    parts.one(parts.push())
    assert parts.store.finished == 0
    assert parts.stored() == [bytes(parts.pool.data[block]) for block in (*BLOCKS, TAIL)]


def test_layers_of_a_ticket_that_is_not_open_wait_for_the_push() -> None:
    parts = Parts()
    assert parts.one(parts.layers(1, attempt=7)).error is None
    assert not parts.store.writes


def test_a_push_that_could_not_begin_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()

    def refuse(ticket: TicketId) -> None:
        raise OutOfBlocks(1, 0, retry_after_ms=1)

    with monkeypatch.context() as patch:
        patch.setattr(parts.store, "begin_tail", refuse)
        assert isinstance(parts.one(parts.layers(1)).error, OutOfBlocks)
    assert not parts.store.writes, "the blocks' slots went back"
    assert parts.one(parts.layers(2)).error is None
    assert parts.one(parts.push()).error is None
    assert parts.store.finished == 0


@pytest.mark.parametrize("way", ["abort", "forsake", "ticket gone", "closed"])
def test_what_was_begun_is_given_up_with_its_ticket(way: str) -> None:
    parts = Parts()
    parts.one(parts.layers(1))
    assert len(parts.store.writes) == 2
    match way:
        case "abort":
            parts.one(Abort(STORE, parts.ticket))
        case "forsake":
            parts.one(Forsake(STORE))
        case "ticket gone":
            parts.store.tickets.clear()
            assert parts.one(parts.push()).error is not None
        case "closed":
            parts.mover.close()
    assert not parts.store.writes
    assert BLOCK_BYTES not in map(len, parts.store.blocks.values())


@pytest.mark.parametrize(("length", "writes"), [(7, 2), (8, 1), (21, 2)])
def test_the_loop_pushes_every_last_chunk_so(length: int, writes: int) -> None:
    """Both a ticket that was open before the step and one that opened during it."""
    rig = Rig()
    rig.prefill()
    rig.decode()
    asked = request(tokens=prompt(length))
    rig.send(asked)
    rig.run()
    assert rig.tokens() == plain(asked)
    assert rig.d_store.finished == writes
    rig.check_idle()


def test_a_prompt_that_is_preempted_or_cancelled_leaves_nothing_begun() -> None:
    rig = Rig()
    loop = rig.prefill()
    rig.decode()
    rig.send(request(tokens=prompt(21)))
    loop.step()
    loop.handle(Preempt(RequestId("r"), 0, Phase.PREFILLING))
    rig.run()
    rig.check_idle()
