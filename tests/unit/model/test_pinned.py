"""A pool on a device and a store's memory: every copy goes straight there, as late as it may, and
none is under way when somebody else may have the memory.
"""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.random_model import TINY
from pdserve.model.pinned import PinnedMemory, address_of
from pdserve.model.pool import KvPool
from tests.unit.model.late_copies import LateCopies, Pages

BLOCKS = 4
CPU = torch.device("cpu")


class Rig:
    """A pool with random bytes, an arena of as many blocks, and what is between them."""

    def __init__(self, *, works: bool = True) -> None:
        self.copies, self.pages = LateCopies(), Pages(works=works)
        self.pool = KvPool(
            TINY,
            block_count=BLOCKS,
            block_tokens=4,
            dtype=torch.float32,
            device=CPU,
            copies=self.copies,
            pinned=PinnedMemory(self.pages),
        )
        self.pool.tensor.copy_(torch.randn(self.pool.tensor.shape))
        size = BLOCKS * self.pool.block_bytes
        self.memory = mmap.mmap(-1, size)
        self.arena = memoryview(self.memory)
        self.pool.pin(lambda: (self.arena,))

    def slot(self, index: int) -> memoryview:
        size = self.pool.block_bytes
        return self.arena[index * size : (index + 1) * size]

    def bytes_of(self, block: int) -> bytes:
        return self.pool.tensor[block].numpy().tobytes()


def test_blocks_that_are_read_together_begin_together_and_each_waits_for_its_own() -> None:
    rig = Rig()
    places = [(block, rig.slot(block)) for block in (2, 0, 3)]
    with rig.pool.reading(places):
        assert len(rig.copies.under_way) == 3
        for left, (block, out) in zip((2, 1, 0), places, strict=True):
            rig.pool.read_block(block, out)
            assert len(rig.copies.under_way) == left
            assert bytes(out) == rig.bytes_of(block)
    assert rig.copies.started == 3


def test_when_somebody_fails_nothing_writes_to_the_memory_any_more() -> None:
    rig = Rig()
    places = [(block, rig.slot(block)) for block in range(BLOCKS)]
    with pytest.raises(ValueError, match="the reader"), rig.pool.reading(places):
        raise ValueError("the reader")
    assert not rig.copies.under_way
    rig.pool.tensor.zero_()
    rig.pool.read_block(0, rig.slot(0))  # what had begun before is forgotten
    assert not any(rig.slot(0))


def test_layers_of_several_blocks_begin_together() -> None:
    rig = Rig()
    size = rig.pool.layer_bytes
    pieces = [(block, rig.slot(block)[size : 2 * size]) for block in range(BLOCKS)]
    with rig.pool.reading(pieces, range(1, 2)):
        assert len(rig.copies.under_way) == BLOCKS
        for block, piece in pieces:
            rig.pool.read_layers(block, 1, 2, piece)
            assert bytes(piece) == rig.bytes_of(block)[size : 2 * size]
    assert rig.copies.started == BLOCKS


def test_writes_are_there_when_the_block_ends_and_at_once_outside() -> None:
    rig = Rig()
    for index in range(BLOCKS):
        rig.slot(index)[:] = bytes([index]) * rig.pool.block_bytes
    with rig.pool.writing():
        for block in range(BLOCKS - 1):
            rig.pool.write_block(block, rig.slot(block))
        assert len(rig.copies.under_way) == BLOCKS - 1
    rig.pool.write_block(BLOCKS - 1, rig.slot(BLOCKS - 1))
    assert not rig.copies.under_way
    for block in range(BLOCKS):
        assert rig.bytes_of(block) == bytes([block]) * rig.pool.block_bytes


@given(st.integers(0, BLOCKS - 1), st.booleans())
def test_other_memory_goes_through_the_buffer(block: int, locks: bool) -> None:
    rig = Rig(works=locks)
    other = memoryview(bytearray(rig.pool.block_bytes)) if locks else rig.slot(block)
    with rig.pool.reading([(block, other)]):
        assert not rig.copies.under_way
        rig.pool.read_block(block, other)
    assert bytes(other) == rig.bytes_of(block)
    other[:] = bytes(len(other))
    with rig.pool.writing():
        rig.pool.write_block(block, other)
        assert not rig.copies.under_way, "the buffer is the next one's"
    assert not any(rig.bytes_of(block))


def test_what_is_pinned_is_found_by_its_place_and_let_go() -> None:
    pages, memory = Pages(), mmap.mmap(-1, 3 * mmap.PAGESIZE)
    view = memoryview(memory)
    pinned = PinnedMemory(pages)
    pinned.add(view[mmap.PAGESIZE : 2 * mmap.PAGESIZE])
    readable = memoryview(bytes(64))
    pinned.add(readable)
    assert sorted(pages.locked.values()) == [(64, False), (mmap.PAGESIZE, True)]
    found = pinned.tensor_of(view[mmap.PAGESIZE + 8 : mmap.PAGESIZE + 24])
    assert found is not None
    assert found.data_ptr() == address_of(view) + mmap.PAGESIZE + 8
    assert len(found) == 16
    del found
    for outside in (view[:8], view[2 * mmap.PAGESIZE - 8 : 2 * mmap.PAGESIZE + 8]):
        assert pinned.tensor_of(outside) is None
        outside.release()
    assert pinned.tensor_of(readable) is not None
    view.release()
    with pytest.raises(BufferError):
        memory.close()  # while it is locked
    pinned.remove()
    assert not pages.locked
    assert pinned.tensor_of(readable) is None
