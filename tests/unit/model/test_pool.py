"""Blocks leave and enter the pool as bytes, exactly, and nothing else moves."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from pdserve.model.architecture import Architecture
from pdserve.model.copies import CudaCopies
from pdserve.model.families.registry import read_architecture
from pdserve.model.kv_codec import scales_of
from pdserve.model.pinned import CudaPages, PinnedMemory
from pdserve.model.pool import KvPool
from pdserve.model.source import ModelFiles
from pdserve.model.transfers import Transfers
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


def test_a_block_of_codes_moves_with_its_scales(architecture: Architecture) -> None:
    pool = KvPool(
        architecture, block_count=3, block_tokens=5, dtype=torch.int8, device=torch.device("cpu")
    )
    pool.tensor[0] = 7
    scales_of(pool.tensor)[0] = 3.0
    content = bytearray(pool.block_bytes)

    pool.read_block(0, memoryview(content))
    pool.write_block(1, memoryview(content))
    pool.copy_block(1, 2)

    for block in (1, 2):
        assert (pool.tensor[block] == 7).all()
        assert (scales_of(pool.tensor)[block] == 3).all()


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
    with pytest.raises(ValueError, match="not 640"):
        pool.read_block(0, content)
    with pytest.raises(ValueError, match="not 640"):
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


def test_layers_of_a_block_are_pieces_of_it(architecture: Architecture) -> None:
    architecture = dataclasses.replace(architecture, layers=architecture.layers * 3)
    pool = filled_pool(architecture)
    whole, end = bytearray(pool.block_bytes), 3
    pool.read_block(2, memoryview(whole))
    pool.await_layers(None)
    for cut in range(end + 1):
        pieces = [bytearray(cut * pool.layer_bytes), bytearray((end - cut) * pool.layer_bytes)]
        pool.read_layers(2, 0, cut, memoryview(pieces[0]))
        pool.read_layers(2, cut, end, memoryview(pieces[1]))
        assert b"".join(pieces) == whole
    with pytest.raises(ValueError, match="layers 0 to 4 of 3"):
        pool.read_layers(2, 0, 4, memoryview(whole))
    with pytest.raises(ValueError, match="the buffer has"):
        pool.read_layers(2, 0, 1, memoryview(whole)[1:])
    with pytest.raises(ValueError, match="is not in a pool"):
        pool.read_layers(-1, 0, end, memoryview(whole))


class PretendedStream:
    """Writes down what is asked of it, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def wait_stream(self, other: str) -> None:
        self.asked.append(f"wait for {other}")

    def wait_event(self, event: str) -> None:
        self.asked.append(f"wait for {event}")

    def synchronize(self) -> None:
        self.asked.append("finish")


def test_on_a_gpu_a_block_enters_after_the_steps_launched_and_leaves_beside_them(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, before = filled_pool(architecture), filled_pool(architecture).tensor
    stream = PretendedStream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    copies, pinned = CudaCopies(torch.device("cpu")), PinnedMemory(CudaPages())
    pool.transfers = Transfers(copies, pinned, pool.block_bytes, on_gpu=False)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "the steps")

    @contextlib.contextmanager
    def copying_in(given: object) -> Iterator[None]:
        assert given is stream
        stream.asked.append("copy")
        yield

    monkeypatch.setattr(torch.cuda, "stream", copying_in)
    content = bytearray(pool.block_bytes)
    pool.read_block(1, memoryview(content))
    pool.write_block(3, memoryview(content))
    assert torch.equal(pool.tensor[3], before[1])
    assert stream.asked == ["copy", "finish", "wait for the steps", "copy", "finish"]
    stream.asked.clear()
    pool.await_layers("its layers")
    part = bytearray(pool.layer_bytes)
    pool.read_layers(1, 0, 1, memoryview(part))
    assert part == content[: pool.layer_bytes]
    assert stream.asked == ["wait for its layers", "copy", "finish"]


def test_a_scratch_block_is_one_more_that_nobody_can_move(architecture: Architecture) -> None:
    pool = KvPool(
        architecture,
        block_count=4,
        block_tokens=5,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        scratch=True,
    )
    assert (pool.block_count, pool.scratch_block, len(pool.tensor)) == (4, 4, 5)
    with pytest.raises(ValueError, match="block 4 is not in a pool of 4"):
        pool.read_block(pool.scratch_block, memoryview(bytearray(pool.block_bytes)))
    with pytest.raises(AssertionError, match="without a scratch block"):
        _ = filled_pool(architecture).scratch_block
