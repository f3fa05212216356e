"""A write in pieces: the checksum is that of the whole, and nothing shows before its end."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import FrameError
from pdserve.ids import BlockKey, SlotId, StoreId
from pdserve.kvstore.answers import WriteGrant
from pdserve.kvstore.arena import Arena, Geometry, block_checksum, create_arena
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.pieces import PiecewiseWrite
from pdserve.kvstore.tickets import OwnerId
from tests.unit.kvstore.test_core import T1, chain, commit, open_ticket

BLOCK_BYTES = 100
KEYS = [BlockKey(bytes([i]) * 16) for i in range(3)]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    path: Path = tmp_path_factory.mktemp("arena") / "arena"
    return create_arena(path, Geometry(4, BLOCK_BYTES), StoreId("store-1"))


@given(st.sets(st.integers(1, BLOCK_BYTES - 1)), st.binary(min_size=200, max_size=200))
def test_pieces_of_any_size_make_the_block_and_its_checksum(
    arena: Arena, cuts: set[int], content: bytes
) -> None:
    grant = WriteGrant(9, 1, (SlotId(3), SlotId(0)), 0)  # of keys 1 and 2
    write = PiecewiseWrite(grant, KEYS, arena)
    assert list(write.indices) == [1, 2]
    for start, end in pairwise(sorted({0, BLOCK_BYTES, *cuts})):
        for place, index in enumerate(write.indices):
            piece = content[place * BLOCK_BYTES :][start:end]
            write.add(index, end - start, _writer(piece))
    payloads, checksums = write.complete()
    for place, payload in enumerate(payloads):
        expected = content[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]
        assert bytes(payload) == expected
        assert bytes(arena.payload(grant.slots[place])) == expected
        assert checksums[place] == block_checksum(KEYS[1 + place], memoryview(expected))


def test_a_block_that_lacks_a_piece_is_not_complete(arena: Arena) -> None:
    write = PiecewiseWrite(WriteGrant(9, 0, (SlotId(0),), 0), KEYS, arena)
    write.add(0, 60, _writer(bytes(60)))
    with pytest.raises(AssertionError, match="60 of 100 bytes"):
        write.complete()
    with pytest.raises(AssertionError, match="60 and 41 bytes of 100"):
        write.add(0, 41, _writer(bytes(41)))


def _writer(piece: bytes) -> Callable[[memoryview], None]:
    def write(out: memoryview) -> None:
        out[:] = piece

    return write


def open_both(keys: Sequence[BlockKey]) -> tuple[StoreCore, OwnerId, WriteGrant, WriteGrant]:
    core = StoreCore(6)
    writer = core.connect("p")
    core.connect("d")
    open_ticket(core, writer, T1, len(keys) + 1, reader="d")
    blocks = core.reserve_push(writer, T1, keys, 0)
    return core, writer, blocks, core.reserve_tail(writer, T1)


@pytest.mark.parametrize("tail_first", [False, True])
def test_blocks_and_tail_of_a_ticket_may_be_filled_at_the_same_time(*, tail_first: bool) -> None:
    core, writer, blocks, tail = open_both(chain("a", 2))
    core.check()
    with pytest.raises(FrameError, match="neither committed nor over"):
        core.seal(writer, T1)
    for grant in (tail, blocks) if tail_first else (blocks, tail):
        commit(core, writer, grant)
        core.check()
    core.seal(writer, T1)
    core.check()


def test_there_is_one_write_of_a_kind() -> None:
    keys = chain("a", 2)
    core, writer, _, _ = open_both(keys)
    with pytest.raises(FrameError, match="neither committed nor over"):
        core.reserve_push(writer, T1, keys, 0)
    with pytest.raises(FrameError, match="neither committed nor over"):
        core.reserve_tail(writer, T1)


@pytest.mark.parametrize("ended_first", [False, True])
def test_an_abort_frees_the_slots_once_the_writer_is_done(*, ended_first: bool) -> None:
    core, writer, blocks, tail = open_both(chain("a", 2))
    if ended_first:
        core.abort(T1)
        assert core.stat().slots_reserved == 3, "they are the writer's until it says so"
    for grant in (blocks, tail):
        core.abandon(writer, grant.write)
        core.check()
    core.abort(T1)
    core.check()
    assert core.stat().slots_free == 6
