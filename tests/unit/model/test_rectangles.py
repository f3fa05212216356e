"""Blocks between pools of every pair of degrees, element by element.

Every element's value says where it belongs: layer, keys or values, head, token, channel. So a
permutation of heads, which an answer's quality may survive, is seen.
"""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from pdserve.errors import ConfigError
from pdserve.model.architecture import Architecture
from pdserve.model.families.registry import read_architecture
from pdserve.model.parallel.parts import Split, part_of
from pdserve.model.parallel.pool import PartedPool
from pdserve.model.parallel.rectangles import Rectangle, objects
from pdserve.model.pool import KvPool
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model
from tests.unit.model.test_parallel import Near

DEGREES = (1, 2, 4, 8)
LAYERS = 3
BLOCK, BLOCKS, BLOCK_TOKENS = 2, 3, 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    directory = write_small_model(tmp_path_factory.mktemp("small"), layers=LAYERS)
    shape = read_architecture(ModelFiles("small", "safetensors", directory))
    return dataclasses.replace(shape, head_count=8, ffn=64)


def dense(architecture: Architecture, dtype: torch.dtype) -> KvPool:
    """The reference: its one block counts through all of its places."""
    pool = KvPool(architecture, block_count=1, block_tokens=BLOCK_TOKENS, dtype=dtype, device=CPU)
    places = np.arange(pool.block_bytes // 2, dtype=np.uint16)
    assert len(places) < 1 << 16, "each place has a value of its own"
    pool.write_block(0, memoryview(places.tobytes()))
    return pool


def ranks_of(
    architecture: Architecture, parts: int, degree: int, dtype: torch.dtype
) -> list[PartedPool]:
    staging = memoryview(bytearray(dense(architecture, dtype).block_bytes))

    def rank_of(rank: int, others: list[PartedPool]) -> PartedPool:
        return PartedPool(
            architecture,
            Split(parts, degree, rank),
            block_count=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            dtype=dtype,
            device=CPU,
            others=[Near(other) for other in others],
            staging=staging,
        )

    behind = [rank_of(rank, []) for rank in range(1, degree)]
    return [rank_of(0, behind), *behind]


def shares(pool: KvPool, parts: int, rank: PartedPool, index: int, degree: int) -> None:
    """What a rank's own tensor must hold: per part, that part's heads of all layers."""
    group = pool.tensor.shape[3] // parts
    for place, part in enumerate(Split(parts, degree, index).parts):
        heads = slice(part * group, (part + 1) * group)
        expected = pool.tensor[0][:, :, heads].view(torch.uint8)
        got = rank.tensor[BLOCK + place * BLOCKS].view(torch.uint8)
        assert torch.equal(got, expected), f"rank {index} of {degree}, part {part}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_what_ranks_of_one_degree_put_those_of_another_take(
    shape: Architecture, kv_heads: int, dtype: torch.dtype
) -> None:
    architecture = dataclasses.replace(shape, kv_head_count=kv_heads)
    reference = dense(architecture, dtype)
    content = bytearray(reference.block_bytes)
    reference.read_block(0, memoryview(content))
    for writing, reading in itertools.product(DEGREES, DEGREES):
        parts = math.lcm(writing, reading)
        if kv_heads % parts:
            with pytest.raises(ConfigError, match=f"its kv_head_count is {kv_heads}; such a model"):
                part_of(architecture, parts)
            continue
        writers = ranks_of(architecture, parts, writing, dtype)
        readers = ranks_of(architecture, parts, reading, dtype)
        writers[0].write_block(BLOCK, memoryview(content))
        for index, rank in enumerate(writers):
            shares(reference, parts, rank, index, writing)
        layers = [bytearray(writers[0].layer_bytes) for _ in range(LAYERS)]
        for layer, out in enumerate(layers):
            writers[0].read_layers(BLOCK, layer, layer + 1, memoryview(out))
        assert b"".join(layers) == content, f"{writing} ranks"
        readers[0].write_block(BLOCK, memoryview(b"".join(layers)))
        for index, rank in enumerate(readers):
            shares(reference, parts, rank, index, reading)


@pytest.mark.parametrize(("parts", "degree"), [(1, 1), (4, 1), (4, 2), (8, 8)])
def test_ranks_have_every_rectangle_once(parts: int, degree: int) -> None:
    layers = range(1, 3)
    everybodys = [
        rectangle
        for rank in range(degree)
        for rectangle in objects(Split(parts, degree, rank), layers)
    ]
    assert everybodys == [Rectangle(layers, group, parts) for group in range(parts)]
    piece = np.zeros(2 * len(layers) * parts * 5, dtype=np.uint8)
    for rectangle in everybodys:
        rectangle.of(piece)[...] += 1
    assert (piece == 1).all()
