import pytest
import torch

from pdserve.model.kernels.blocks import (
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)
from tests.kernels.support import DEVICE, DTYPES, randn


def block_ids(*blocks: int) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("P", "E", "blocks"),
    [
        (4, 2048, [2]),  # exactly one tile
        (4, 2049, [3, 0]),  # one element into the next tile
        (4, 7, [1, 1, 1]),  # less than a tile; one block three times
        (24, 64, list(range(23, -1, -1))),  # all, backwards
        (4, 16, []),  # nothing to do
    ],
)
def test_gathered_blocks_are_the_pools_bits(
    P: int, E: int, blocks: list[int], dtype: torch.dtype
) -> None:
    pool_PE, blocks_S = randn(P, E, dtype=dtype), block_ids(*blocks)
    assert torch.equal(gather_blocks(pool_PE, blocks_S), gather_blocks_reference(pool_PE, blocks_S))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("E", "blocks"), [(2048, [2]), (2049, [3, 0]), (7, [1, 3, 0, 2]), (16, [])]
)
def test_scattered_blocks_change_their_rows_and_no_other(
    E: int, blocks: list[int], dtype: torch.dtype
) -> None:
    pool_PE, blocks_S = randn(4, E, dtype=dtype), block_ids(*blocks)
    staging_SE = randn(len(blocks), E, dtype=dtype, seed=1)
    expected_PE = pool_PE.clone()
    scatter_blocks_reference(staging_SE, blocks_S, expected_PE)
    scatter_blocks(staging_SE, blocks_S, pool_PE)
    assert torch.equal(pool_PE, expected_PE)


def test_the_pool_may_be_a_view_with_gaps_between_blocks() -> None:
    wide = randn(5, 3, 40, dtype=torch.bfloat16)
    pool_PE, before = wide[:, 1], wide.clone()
    blocks_S = block_ids(4, 2)
    staging_SE = gather_blocks(pool_PE, blocks_S)
    assert torch.equal(staging_SE, pool_PE[[4, 2]])
    scatter_blocks(staging_SE.neg(), blocks_S, pool_PE)
    before[[4, 2], 1] *= -1
    assert torch.equal(wide, before)


def test_a_nan_travels_with_its_bits() -> None:
    pool_PE = torch.tensor([[0x7F81, 0x7FC0, 0xFF80]], dtype=torch.int32, device=DEVICE)
    bits = pool_PE.to(torch.int16).view(torch.bfloat16)
    gathered = gather_blocks(bits, block_ids(0))
    assert torch.equal(gathered.view(torch.int16), bits.view(torch.int16))


@pytest.mark.parametrize(
    ("pool_PE", "blocks_S", "said"),
    [
        (torch.zeros(4), torch.zeros(1, dtype=torch.int32), "contiguous rows"),
        (torch.zeros(4, 4).t()[:, :2], torch.zeros(1, dtype=torch.int32), "contiguous rows"),
        (torch.zeros(4, 4), torch.zeros(1, dtype=torch.int64), "int64"),
        (torch.zeros(4, 4), torch.zeros(1, 1, dtype=torch.int32), r"\[S\] int32"),
        (torch.zeros(4, 4), torch.zeros(4, dtype=torch.int32)[::2], "contiguous"),
        (torch.zeros(4, 4), torch.zeros(1, dtype=torch.int32, device="meta"), "meta"),
    ],
)
def test_what_cannot_be_gathered_is_refused(
    pool_PE: torch.Tensor, blocks_S: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        gather_blocks(pool_PE, blocks_S)


@pytest.mark.parametrize(
    "staging_SE",
    [
        torch.zeros(2, 4),  # two rows for one block
        torch.zeros(1, 3),  # too narrow
        torch.zeros(1, 4, dtype=torch.float16),
        torch.zeros(1, 8)[:, ::2],
    ],
)
def test_a_staging_buffer_that_does_not_fit_is_refused(staging_SE: torch.Tensor) -> None:
    pool_PE = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="staging must be"):
        scatter_blocks(staging_SE, torch.zeros(1, dtype=torch.int32), pool_PE)
