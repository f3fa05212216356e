"""Blocks that are packed where they lie: what stores see is what a CPU packs, whatever is begun
together, and nothing is under way when somebody else may have the memory.
"""

import dataclasses
import mmap

import pytest
import torch

from bench.random_model import TINY
from pdserve.model import packed_on_device
from pdserve.model.architecture import Architecture
from pdserve.model.packed_on_device import PackedOnDevice
from pdserve.model.packed_pool import CODE_DTYPES, PackedPool, packed_pool
from pdserve.model.pinned import PinnedMemory
from pdserve.model.pool import KvPool
from tests.unit.model.late_copies import LateCopies, Pages

BLOCKS, LAYERS = 5, TINY.layer_count
CODECS = pytest.mark.parametrize("codec", list(CODE_DTYPES))


def random_pool(
    copies: LateCopies | None = None, *, works: bool = True, shape: Architecture = TINY
) -> KvPool:
    pool = KvPool(
        shape,
        block_count=BLOCKS,
        block_tokens=16,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        copies=copies,
        pinned=PinnedMemory(Pages(works=works)),
    )
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(3)))
    return pool


class Rig:
    """A pool on a GPU that is played, an arena, and the same pool on a CPU."""

    def __init__(self, codec: str = "int8", *, works: bool = True) -> None:
        self.copies = LateCopies()
        self.pool, self.plain = random_pool(self.copies, works=works), random_pool()
        packed, self.on_cpu = (packed_pool(each, TINY, codec) for each in (self.pool, self.plain))
        assert isinstance(packed, PackedOnDevice)
        assert isinstance(self.on_cpu, PackedPool)
        self.packed = packed
        self.arena = memoryview(mmap.mmap(-1, BLOCKS * packed.block_bytes))
        packed.pin(lambda: (self.arena,))

    def slot(self, index: int) -> memoryview:
        size = self.packed.block_bytes
        return self.arena[index * size : (index + 1) * size]

    def expected(self, block: int) -> bytes:
        out = bytearray(self.on_cpu.block_bytes)
        self.on_cpu.read_block(block, memoryview(out))
        return bytes(out)


@CODECS
@pytest.mark.parametrize("works", [True, False])
def test_one_block_goes_out_and_comes_in_as_on_a_cpu(codec: str, works: bool) -> None:
    rig = Rig(codec, works=works)
    rig.packed.read_block(2, rig.slot(0))
    assert bytes(rig.slot(0)) == rig.expected(2)
    for pool in (rig.packed, rig.on_cpu):
        pool.write_block(4, rig.slot(0))
    assert torch.equal(rig.pool.tensor, rig.plain.tensor)
    assert not rig.copies.under_way


@CODECS
@pytest.mark.parametrize("rows_max", [64, 2])
def test_those_that_are_begun_together_take_turns(
    codec: str, rows_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_on_device, "ROWS_MAX", rows_max)
    rig = Rig(codec)
    places = [(block, rig.slot(4 - block)) for block in (3, 0, 4, 1, 2)]
    with rig.packed.reading(places):
        assert len(rig.copies.under_way) == 5 + -(-5 // rows_max)  # copies and kernels
        for block, out in places:
            rig.packed.read_block(block, out)
            assert bytes(out) == rig.expected(block)

    with rig.packed.writing():
        for block in range(BLOCKS):
            rig.packed.write_block(block, rig.slot(block))
        assert rig.copies.under_way
    for block in range(BLOCKS):
        rig.on_cpu.write_block(block, rig.slot(block))
    assert torch.equal(rig.pool.tensor, rig.plain.tensor)
    assert not rig.copies.under_way
    rig.packed.write_block(0, rig.slot(1))  # one by itself is waited for, now as before
    assert torch.equal(rig.pool.tensor[0], rig.plain.tensor[1])


@CODECS
def test_layers_that_are_begun_are_pieces_of_the_block(codec: str) -> None:
    rig = Rig(codec)
    size = rig.packed.layer_bytes
    for first, end in ((0, 1), (1, LAYERS)):
        places = [(block, rig.slot(block)[first * size : end * size]) for block in range(3)]
        with rig.packed.reading(places, range(first, end)):
            for block, out in places:
                rig.packed.read_layers(block, first, end, out)
    for block in range(3):
        assert bytes(rig.slot(block)) == rig.expected(block)


def test_what_was_begun_is_not_under_way_when_a_move_fails() -> None:
    rig = Rig()
    with pytest.raises(RuntimeError, match="lost"), rig.packed.reading([(1, rig.slot(1))]):
        raise RuntimeError("lost")
    assert not rig.copies.under_way

    def write(*blocks: int) -> None:
        with rig.packed.writing():
            for block in blocks:
                rig.packed.write_block(block, rig.slot(1))

    with pytest.raises(ValueError, match="not in a pool"):
        write(0, BLOCKS)
    assert not rig.copies.under_way


def test_a_foreign_block_and_a_buffer_of_another_size_are_refused() -> None:
    rig = Rig()
    with pytest.raises(ValueError, match="not in a pool of 5"):
        rig.packed.read_block(BLOCKS, rig.slot(0))
    with pytest.raises(ValueError, match="bytes, not"):
        rig.packed.write_block(0, rig.slot(0)[1:])
    with pytest.raises(ValueError, match="bytes, not"):
        rig.packed.read_layers(0, 0, 1, rig.slot(0))


def test_heads_that_no_kernel_takes_are_packed_by_the_cpu() -> None:
    odd = dataclasses.replace(TINY, head_dim=12)
    pool = random_pool(LateCopies(), shape=odd)
    assert isinstance(packed_pool(pool, odd, "int8"), PackedPool)
