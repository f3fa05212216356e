"""Blocks leave and enter the pool as bytes, exactly, and nothing else moves."""

import dataclasses

import pytest
import torch

from pdserve.model.architecture import Architecture
from pdserve.model.families.registry import read_architecture
from pdserve.model.pool import KvPool
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = write_small_model(tmp_path_factory.mktemp("small"), layers=1)
    return read_architecture(ModelFiles("small", "safetensors", directory))


def filled_pool(architecture: Architecture, dtype: torch.dtype = torch.bfloat16) -> KvPool:
    pool = KvPool(
        architecture, block_count=4, block_tokens=5, dtype=dtype, device=torch.device("cpu")
    )
    generator = torch.Generator().manual_seed(1)
    pool.tensor.copy_(torch.randn(pool.tensor.shape, generator=generator))
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_moves_as_its_bytes(architecture: Architecture, dtype: torch.dtype) -> None:
    pool = filled_pool(architecture, dtype)
    before = pool.tensor.clone()
    content = bytearray(pool.block_bytes)

    pool.read_block(1, memoryview(content))
    pool.write_block(3, memoryview(bytes(content)))  # read-only memory will do

    assert torch.equal(pool.tensor[3], before[1])
    assert torch.equal(pool.tensor[:3], before[:3])


def test_a_block_has_keys_and_values_of_every_layer(architecture: Architecture) -> None:
    two_layers = dataclasses.replace(architecture, layers=architecture.layers * 2)
    # 2 layers, keys and values, 2 heads, 5 tokens, 16 channels of 2 bytes
    assert filled_pool(two_layers).block_bytes == 2 * 2 * 2 * 5 * 16 * 2


def test_a_block_is_copied_within_the_pool(architecture: Architecture) -> None:
    pool = filled_pool(architecture)
    pool.copy_block(0, 2)
    assert torch.equal(pool.tensor[0], pool.tensor[2])


def test_unwritten_blocks_are_zero(architecture: Architecture) -> None:
    pool = KvPool(
        architecture,
        block_count=1,
        block_tokens=5,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert not pool.tensor.any()


@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_outside_the_pool_is_refused(architecture: Architecture, block: int) -> None:
    pool = filled_pool(architecture)
    content = memoryview(bytearray(pool.block_bytes))
    with pytest.raises(ValueError, match="not in a pool of 4"):
        pool.read_block(block, content)
    with pytest.raises(ValueError, match="not in a pool of 4"):
        pool.write_block(block, content)
    with pytest.raises(ValueError, match="not in a pool of 4"):
        pool.copy_block(0, block)


@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_buffer_of_another_size_is_refused(architecture: Architecture, surplus: int) -> None:
    pool = filled_pool(architecture)
    content = memoryview(bytearray(pool.block_bytes + surplus))
    with pytest.raises(ValueError, match="a block 640"):
        pool.read_block(0, content)
    with pytest.raises(ValueError, match="a block 640"):
        pool.write_block(0, content)


def test_a_pool_without_blocks_is_refused(architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="block_count is 0"):
        KvPool(
            architecture,
            block_count=0,
            block_tokens=5,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )


def test_the_bytes_lie_layer_by_layer_keys_first(architecture: Architecture) -> None:
    """The order that other workers and hosts rely on: layer, k/v, head, token, channel."""
    pool = filled_pool(architecture, torch.float32)
    content = bytearray(pool.block_bytes)
    pool.read_block(0, memoryview(content))
    flat = torch.frombuffer(content, dtype=torch.float32)
    values_of_head_1_token_2 = flat[((0 * 2 + 1) * 2 + 1) * 5 * 16 + 2 * 16 :][:16]
    assert torch.equal(values_of_head_1_token_2, pool.tensor[0, 0, 1, 1, 2])


def test_numbers_that_are_no_number_survive(architecture: Architecture) -> None:
    pool = filled_pool(architecture)
    pool.tensor[0] = torch.nan
    content = bytearray(pool.block_bytes)
    pool.read_block(0, memoryview(content))
    pool.write_block(1, memoryview(content))
    assert pool.tensor[1].isnan().all()
