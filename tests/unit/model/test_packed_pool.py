"""A pool behind a codec: what leaves it by layers is what leaves it whole, and it comes back."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pdserve.model.architecture import Architecture
from pdserve.model.families.registry import read_architecture
from pdserve.model.packed_pool import CODE_DTYPES, packed_pool
from pdserve.model.pool import KvPool
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model

LAYERS, BLOCKS, BLOCK_TOKENS = 3, 2, 8
CODECS = pytest.mark.parametrize("codec", list(CODE_DTYPES))


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory: Path = write_small_model(tmp_path_factory.mktemp("small"), layers=LAYERS)
    return read_architecture(ModelFiles("small", "safetensors", directory))


def plain_pool(shape: Architecture) -> KvPool:
    pool = KvPool(
        shape,
        block_count=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(7)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=generator))
    return pool


@CODECS
def test_stretches_of_layers_are_the_block(shape: Architecture, codec: str) -> None:
    packed = packed_pool(plain_pool(shape), shape, codec)
    whole, by_layers = bytearray(packed.block_bytes), bytearray(packed.block_bytes)
    packed.read_block(1, memoryview(whole))
    for first, end in ((0, 1), (1, 3)):
        part = slice(first * packed.layer_bytes, end * packed.layer_bytes)
        packed.read_layers(1, first, end, memoryview(by_layers)[part])
    assert by_layers == whole
    assert any(whole)


@CODECS
def test_what_comes_back_is_close_and_only_there(shape: Architecture, codec: str) -> None:
    pool = plain_pool(shape)
    before = pool.tensor.clone()
    packed = packed_pool(pool, shape, codec)
    data = bytearray(packed.block_bytes)
    packed.read_block(0, memoryview(data))
    pool.tensor[1].zero_()
    packed.write_block(1, memoryview(bytes(data)))  # as a store's memory: not to be written
    assert torch.equal(pool.tensor[0], before[0])
    error = (pool.tensor[1].float() - before[0].float()).abs().max()
    assert 0 < error < 0.2
    assert packed.block_bytes < 0.7 * pool.block_bytes


@CODECS
def test_going_through_twice_changes_little_more(shape: Architecture, codec: str) -> None:
    """A stream that is parked and resumed goes through it again."""
    pool = plain_pool(shape)
    packed = packed_pool(pool, shape, codec)
    data = memoryview(bytearray(packed.block_bytes))
    seen = []
    for _ in range(3):
        packed.read_block(0, data)
        packed.write_block(0, data)
        seen.append(pool.tensor[0].float().clone())
    assert (seen[2] - seen[0]).abs().max() < 0.1


def test_a_shape_of_its_own_for_each_model(shape: Architecture) -> None:
    wider = dataclasses.replace(shape, kv_head_count=2 * shape.kv_head_count)
    sizes = [packed_pool(plain_pool(each), each, "int8").block_bytes for each in (shape, wider)]
    assert sizes[1] == 2 * sizes[0]
