"""A pool's blocks in 8 bits: the bits that ``store_codec`` has on a CPU, both ways."""

import pytest
import torch

from pdserve.model.kernels.store_blocks import pack_blocks, unpack_blocks
from pdserve.model.store_codec import BlockCodec
from tests.kernels.support import DEVICE, DTYPES, randn

CODES = (torch.int8, torch.float8_e4m3fn)
L, G, D = 3, 2, 16


def codec(dtype: torch.dtype, code: torch.dtype, T: int, layers: int = L) -> BlockCodec:
    return BlockCodec(layers, G, T, D, dtype, code)


def some_pool(T: int, dtype: torch.dtype) -> torch.Tensor:
    """With a channel and a token that are large, some that are nothing, and every magnitude."""
    pool_PL2GTD = randn(4, L, 2, G, T, D, dtype=torch.float32)
    pool_PL2GTD[..., 3] *= 100
    pool_PL2GTD[..., 0, :] *= 20
    pool_PL2GTD[1, ..., 5] = 0
    pool_PL2GTD[2, 1] *= 2.0 ** -torch.arange(D, device=DEVICE)
    pool_PL2GTD[3, 0, 0, 0] = 0
    return pool_PL2GTD.to(dtype)


def block_ids(*blocks: int) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int32, device=DEVICE)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytearray(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()))


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [16, 24, 2])
def test_packed_as_on_a_cpu(T: int, dtype: torch.dtype, code: torch.dtype) -> None:
    pool = some_pool(T, dtype)
    reference = codec(dtype, code, T)
    packed_SJ = torch.zeros(3, reference.packed_bytes, dtype=torch.uint8, device=DEVICE)
    pack_blocks(pool, block_ids(2, 3, 1), range(L), code, packed_SJ)
    for row, block in zip(packed_SJ, (2, 3, 1), strict=True):
        expected = memoryview(bytearray(reference.packed_bytes))
        reference.pack(bytes_of(pool[block]), expected)
        assert bytes_of(row) == expected


@pytest.mark.parametrize("code", CODES)
def test_some_layers_are_a_piece_of_the_block(code: torch.dtype) -> None:
    pool = some_pool(16, torch.bfloat16)
    whole, part = codec(torch.bfloat16, code, 16), codec(torch.bfloat16, code, 16, layers=2)
    whole_SJ = torch.zeros(1, whole.packed_bytes, dtype=torch.uint8, device=DEVICE)
    part_SJ = torch.zeros(1, part.packed_bytes, dtype=torch.uint8, device=DEVICE)
    pack_blocks(pool, block_ids(2), range(L), code, whole_SJ)
    pack_blocks(pool, block_ids(2), range(1, 3), code, part_SJ)
    assert torch.equal(part_SJ[0], whole_SJ[0, -part.packed_bytes :])


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [16, 24])
def test_unpacked_as_on_a_cpu_and_nowhere_else(
    T: int, dtype: torch.dtype, code: torch.dtype
) -> None:
    source, pool = some_pool(T, dtype), randn(4, L, 2, G, T, D, dtype=dtype, seed=1)
    before = pool.clone()
    reference = codec(dtype, code, T)
    packed_SJ = torch.zeros(2, reference.packed_bytes, dtype=torch.uint8, device=DEVICE)
    pack_blocks(source, block_ids(1, 2), range(L), code, packed_SJ)
    unpack_blocks(packed_SJ, code, block_ids(3, 0), pool)
    for row, block in zip(packed_SJ, (3, 0), strict=True):
        expected = memoryview(bytearray(reference.plain_bytes))
        reference.unpack(bytes_of(row), expected)
        assert bytes_of(pool[block]) == expected
    assert torch.equal(pool[1:3], before[1:3])


def test_a_number_that_is_none_spoils_its_channel_and_its_token_alone() -> None:
    pool = some_pool(16, torch.bfloat16)
    pool[0, 0, :, 0, 4, 5] = float("nan")
    packed_SJ = torch.zeros(
        1, codec(torch.bfloat16, torch.int8, 16).packed_bytes, dtype=torch.uint8, device=DEVICE
    )
    pack_blocks(pool, block_ids(0), range(L), torch.int8, packed_SJ)
    back = torch.zeros_like(pool)
    unpack_blocks(packed_SJ, torch.int8, block_ids(0), back)
    spoilt = back[0].isnan()
    assert spoilt[0, 0, 0, :, 5].all()
    assert spoilt[0, 1, 0, 4, :].all()
    assert spoilt.sum() == 16 + D


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code": torch.int16}, "cannot pack"),
        ({"layers": range(2, 4)}, "no stretch of 3 layers"),
        ({"blocks": torch.zeros(1, dtype=torch.int64)}, "int64"),
        ({"packed": torch.zeros(1, 7, dtype=torch.uint8)}, "packed blocks must be"),
        ({"pool": torch.zeros(2, L, 2, G, 4, 12)}, "power of two"),
        ({"pool": torch.zeros(2, L, 2, G, 4)}, r"\[P, L, 2, G, T, D\]"),
    ],
)
def test_what_cannot_be_packed_is_refused(change: dict[str, object], said: str) -> None:
    reference = codec(torch.float32, torch.int8, 4)
    values = {
        "pool": torch.zeros(2, L, 2, G, 4, D),
        "blocks": torch.zeros(1, dtype=torch.int32),
        "layers": range(L),
        "code": torch.int8,
        "packed": torch.zeros(1, reference.packed_bytes, dtype=torch.uint8),
        **change,
    }
    with pytest.raises(ValueError, match=said):
        pack_blocks(*values.values())  # type: ignore[arg-type]
