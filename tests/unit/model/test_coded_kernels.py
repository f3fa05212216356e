"""The C++ kernels on a pool of int8 codes, against the torch path."""

import math

import pytest
import torch

from pdserve.model.kv_codec import encoded, scales_of
from pdserve.model.torch_ops import TorchOps
from tests.unit.model.coded_pool import coded_pool
from tests.unit.model.conftest import ops_named
from tests.unit.model.test_cpu_ops import DTYPES, close, draw, layout

INT8 = torch.int8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "block_tokens"), [(2, 5), (24, 5), (64, 16)])
def test_the_codes_are_those_of_what_a_plain_pool_gets(
    head_dim: int, block_tokens: int, dtype: torch.dtype
) -> None:
    heads, kv_heads, layers = 4, 2, 3
    batch = layout([(0, 7), (11, 1)], block_tokens, [[6, 2], [4, 3, 0]])
    qkv = draw(8, heads + 2 * kv_heads, head_dim, dtype=dtype)
    qkv[3, heads:] *= 1e-4
    qkv[4, heads] = 0
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    rope = draw(32, head_dim, dtype=torch.float32)
    ops = ops_named("cpu")
    plain = torch.zeros(7, layers, 2, kv_heads, block_tokens, head_dim, dtype=dtype)
    coded = coded_pool(7, layers, kv_heads, block_tokens, head_dim, INT8)
    outs = [ops.rope_and_cache(q, k, v, rope, batch, pool, 1) for pool in (plain, coded)]
    assert torch.equal(*outs)
    codes, scales = encoded(plain, INT8)
    assert torch.equal(coded, codes)
    assert torch.equal(scales_of(coded), scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "runs"),
    [
        (4, 2, 64, 16, [(63, 1), (64, 1), (65, 1)]),  # around the end of a tile
        (9, 3, 64, 16, [(0, 65), (10, 100)]),  # a tile and one more, a chunk
        (7, 1, 24, 5, [(0, 40), (130, 3)]),  # odd sizes
    ],
)
def test_attention_equals_the_reference(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    runs: list[tuple[int, int]],
    window: int | None,
    dtype: torch.dtype,
) -> None:
    free = iter(torch.randperm(64, generator=torch.Generator().manual_seed(7)).tolist())
    blocks = [[next(free) for _ in range(-(-sum(run) // block_tokens))] for run in runs]
    batch = layout(runs, block_tokens, blocks)
    q = draw(len(batch.positions_N), heads, head_dim, dtype=dtype)
    pool = coded_pool(64, 2, kv_heads, block_tokens, head_dim, INT8)
    codes, scales = encoded(draw(*pool.shape, dtype=dtype), INT8)
    pool.copy_(codes)
    scales_of(pool).copy_(scales)
    ours, reference = (
        ops.attention(q, batch, pool, 1, head_dim**-0.5, window)
        for ops in (ops_named("cpu"), TorchOps())
    )
    close(ours, reference)


def test_what_is_behind_the_context_or_before_the_window_is_not_read() -> None:
    batch = layout([(100, 3)], 16, [list(range(7))])
    pool = coded_pool(7, 1, 1, 16, 24, INT8).fill_(1)
    scales_of(pool).fill_(1.0)
    q = draw(3, 2, 24, dtype=torch.float32)
    clean = ops_named("cpu").attention(q, batch, pool, 0, 1.0, 20)
    for position in (*range(100 - 20 + 1), *range(103, 112)):
        scales_of(pool)[position // 16, :, :, :, position % 16] = math.nan
    assert torch.equal(ops_named("cpu").attention(q, batch, pool, 0, 1.0, 20), clean)


def test_codes_the_kernels_do_not_know_are_refused() -> None:
    batch = layout([(0, 1)], 16, [[0]])
    pool = coded_pool(1, 1, 1, 16, 16, torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        ops_named("cpu").attention(draw(1, 1, 16, dtype=torch.float32), batch, pool, 0, 1.0)
