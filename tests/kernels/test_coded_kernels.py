"""The Triton kernels on a pool of codes, against their references, and each row alone."""

import math

import pytest
import torch

from pdserve.model.kernels.attention import paged_attention, paged_attention_reference
from pdserve.model.kernels.rope import rope_and_cache
from pdserve.model.kv_codec import encoded, scales_of
from tests.kernels.support import DEVICE, TOLERANCE, assert_near, randn
from tests.unit.model.coded_pool import coded_pool

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def pool_of(plain_P2GTD: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The same in codes; a layer of several."""
    P, _, G, T, D = plain_P2GTD.shape
    pool = coded_pool(P, 2, G, T, D, stored).to(DEVICE)[:, 1]
    codes, scales = encoded(plain_P2GTD, stored)
    pool.view(torch.uint8).copy_(codes.view(torch.uint8))
    scales_of(pool).copy_(scales)
    return pool


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, INT8), (torch.bfloat16, INT8), (torch.bfloat16, FP8)]
)
def test_the_codes_are_those_of_what_a_plain_pool_gets(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    N, H, G, D, T, P = 12, 5, 3, 16, 4, 5
    qkv = randn(N, H + 2 * G, D, dtype=dtype)
    qkv[3, H:] *= 1e-4
    qkv[4, H] = 0
    q, k, v = torch.split(qkv, [H, G, G], dim=1)
    # Magnitudes within a row are far apart, so that codes below the normal ones are among them.
    v = v * torch.logspace(-4, 0, D, device=DEVICE).to(dtype)
    rope = randn(100, D, dtype=torch.float32, seed=1)
    positions = torch.arange(N, device=DEVICE)
    slots = torch.randperm(P * T, generator=torch.Generator().manual_seed(7))[:N].to(DEVICE)
    plain = torch.zeros(P, 2, G, T, D, dtype=dtype, device=DEVICE)
    coded = coded_pool(P, 2, G, T, D, stored).to(DEVICE)[:, 1]
    outs = [rope_and_cache(q, k, v, rope, positions, slots, pool) for pool in (plain, coded)]
    assert torch.equal(*outs)
    codes, scales = encoded(plain, stored)
    # +0 and -0 are one number.
    assert torch.equal(coded.float(), codes.float())
    assert torch.equal(scales_of(coded), scales)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.float32, FP8), (torch.bfloat16, INT8), (torch.float16, INT8)]
)
def test_attention_equals_the_reference_and_each_row_itself_alone(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    """Two runs: five tokens at the end of 70, and the last of 33."""
    H, G, D, T = 4, 2, 16, 16
    plain = randn(9, 2, G, T, D, dtype=dtype)
    # Values so small that a weight times a scale would be lost in float16.
    plain[:, 1] *= 2.0**-10
    pool = pool_of(plain, stored)
    pool_scales = scales_of(pool)
    pool_scales[8] = math.nan  # nobody's
    pool_scales[4, :, :, 6:] = math.nan  # behind the ends of the runs
    pool_scales[7, :, :, 1:] = math.nan
    tables = torch.tensor([[3, 0, 5, 1, 4], [2, 6, 7, 0, 0]], dtype=torch.int32, device=DEVICE)
    q = randn(6, H, D, dtype=dtype, seed=2)

    def attended(first: int, length: int, run: int, context: int) -> torch.Tensor:
        return paged_attention(
            q[first : first + length],
            torch.tensor([0, length], dtype=torch.int32, device=DEVICE),
            tables[run : run + 1],
            torch.tensor([context], dtype=torch.int32, device=DEVICE),
            pool,
            D**-0.5,
            longest_run=length,
            longest_context=context,
        )

    together = paged_attention(
        q,
        starts := torch.tensor([0, 5, 6], dtype=torch.int32, device=DEVICE),
        tables,
        contexts := torch.tensor([70, 33], dtype=torch.int32, device=DEVICE),
        pool,
        D**-0.5,
        longest_run=5,
        longest_context=70,
    )
    reference = paged_attention_reference(q, starts, tables, contexts, pool, D**-0.5)
    # Weights times scales are bfloat16 there, too.
    tolerance = TOLERANCE[torch.bfloat16 if dtype == torch.float16 else dtype]
    torch.testing.assert_close(together * 2**10, reference * 2**10, rtol=tolerance, atol=tolerance)
    alone = [attended(n, 1, 0, 66 + n) for n in range(5)] + [attended(5, 1, 1, 33)]
    assert torch.equal(torch.cat(alone), together)


def test_splits_of_a_long_context_are_joined() -> None:
    H, G, D, T, context = 2, 1, 16, 16, 530
    plain = randn(34, 2, G, T, D, dtype=torch.float32)
    arguments = (
        randn(1, H, D, dtype=torch.float32, seed=2),
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
        torch.arange(34, dtype=torch.int32, device=DEVICE)[None],
        torch.tensor([context], dtype=torch.int32, device=DEVICE),
        pool_of(plain, INT8),
        D**-0.5,
    )
    ours = paged_attention(*arguments, longest_run=1, longest_context=context, window=525)
    assert_near(ours, paged_attention_reference(*arguments, window=525))


def test_a_plain_pool_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"like q, int8 or fp8, got torch\.float16"):
        paged_attention(
            randn(1, 2, 16, dtype=torch.float32),
            torch.tensor([0, 1], dtype=torch.int32, device=DEVICE),
            torch.zeros(1, 1, dtype=torch.int32, device=DEVICE),
            torch.ones(1, dtype=torch.int32, device=DEVICE),
            randn(1, 2, 1, 16, 16, dtype=torch.float16),
            0.25,
            longest_run=1,
            longest_context=1,
        )
