"""Causal attention over the paged KV pool, for prefill chunks and decoded tokens alike.

The bits of a row depend on its query and on the KV before it, on nothing else. Four rules see to
that:

* KV is read in tiles of ``tokens`` at absolute positions. Tiles that begin at or after a row's end
  are hidden from it, and a hidden tile changes nothing: it adds zeros, times one.
* A *window* hides, likewise, tiles and splits that end before it. Programs start at the first that
  one of their rows sees.
* Tiles are summed (online softmax) within *splits* of ``SPLIT_TOKENS``, again at absolute
  positions, and splits are joined in ascending order. Whether one program walks all splits of its
  rows (``prefill_attention_kernel``) or each split has a program that leaves its part in memory for
  a second kernel to join (``decode_attention_kernel``: one token's context, spread over the whole
  GPU), the same numbers meet in the same order. Where a multiplication and an addition are to be
  one, ``tl.fma`` says so, and the compiler may fuse no others.
* Decode and prefill use tiles of one shape, and so the same machine instructions; 32 rows also
  keep Hopper and Blackwell from the larger matrix instructions they have for 64.
  ``deterministic=False`` gives long runs larger tiles and no splits: faster, and a row may then
  differ in its last bits from the same row in a short run or alone.

Rows: the query heads that share a key/value head are rows of the same tile, as they read the same
KV: row = query * heads_per_group + head_in_group.

Shape letters, in this file:
    N  tokens of the batch    R  runs: one per sequence    B  blocks of the longest table
    H  query heads            G  key/value heads           D  channels of a head
    P  blocks of the pool     T  tokens of a block         S  splits of the longest context

Source of the online softmax and of split KV: Dao et al., "FlashAttention-2", arXiv:2307.08691, and
the same authors' "Flash-Decoding" note of 2023.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from pdserve.model import kv_codec
from pdserve.model.kernels.attention_kernels import (
    decode_attention_kernel,
    join_splits_kernel,
    prefill_attention_kernel,
)
from pdserve.model.kernels.codec import CODECS, PLAIN, POINTERS, parts_of
from pdserve.model.kernels.configuration import DTYPES, HEAD_DIMS, OPTIONS, Configuration

SPLIT_TOKENS = 512
"""Enough work to hide a split's start, and 16 programs per head for one context of 8,192."""

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program works on at a time, and with how many hands."""

    rows: int
    tokens: int
    warps: int
    stages: int


def decode_tiles(
    dtype: torch.dtype, D: int, *, windowed: bool = False, coded: bool = False
) -> Tiles:
    """Decode waits for memory, so rows that only pad a tile cost nothing; float32, which has no
    exact matrix instruction, has its multiply-adds shared by more warps. So are heads of 256, whose
    sums would not fit four warps' registers. Hiding what is before a window takes the registers of
    one stage; taking codes apart, those of more."""
    if coded:
        rows = 16 if D > 128 and dtype == torch.float32 else 32
        warps = 4 if D == 128 and dtype == torch.bfloat16 else 8
        return Tiles(rows=rows, tokens=32, warps=warps, stages=1)
    if dtype == torch.float32:
        rows = 16 if D > 64 else 32
        return Tiles(rows=rows, tokens=rows, warps=8, stages=1 if windowed or D > 128 else 2)
    if D > 128:
        return Tiles(rows=32, tokens=64, warps=8, stages=2)
    return Tiles(rows=32, tokens=64 if D > 64 else 32, warps=4, stages=2 if windowed else 3)


def prefill_tiles(
    dtype: torch.dtype,
    D: int,
    *,
    deterministic: bool,
    windowed: bool = False,
    coded: bool = False,
) -> Tiles:
    """Each tile of keys and values is read for all rows of a program, so the rows are what a byte
    from the L2 cache is multiplied with: 128 of them are two times 64, the rows of Hopper's matrix
    instructions, for eight warps, and at heads of 128 make 128 operations per byte. An H200 must
    have some 140 where it multiplies at 790 TFLOP/s and its L2 gives 5.5 TB/s; 64 rows could come
    to 45 % of that at most. ``make kernels`` says that they fit the registers of every generation,
    with a program per multiprocessor either way; for heads of 256, or of codes, none do that are
    larger than decode's."""
    if deterministic or dtype == torch.float32 or D > 128 or coded:
        return decode_tiles(dtype, D, windowed=windowed, coded=coded)
    return Tiles(rows=128, tokens=64, warps=8, stages=2)


def paged_attention(
    q_NHD: torch.Tensor,
    starts_R1: torch.Tensor,
    tables_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    pool_P2GTD: torch.Tensor,
    scale: float,
    *,
    longest_run: int,
    longest_context: int,
    window: int | None = None,
    deterministic: bool = True,
) -> torch.Tensor:
    """Causal attention of every token over its run's KV, which is in the pool, its own included.

    The last token of run r stands at position ``contexts[r] - 1``. Query head h reads key/value
    head ``h // (H / G)``.

    Args:
        q_NHD: [N, H, D], channels contiguous.
        starts_R1: [R + 1] int32, ascending from 0 to N.
        tables_RB: [R, B] int32, rows contiguous: the blocks of each run, in order.
        contexts_R: [R] int32, each at least its run's length.
        pool_P2GTD: [P, 2, G, T, D], one layer of the pool, channels contiguous; of the dtype of q,
            or in 8 bits with scales (``kv_codec``).
        scale: of the scores, positive; usually D ** -0.5.
        longest_run: tokens of the longest run; a larger number only costs time.
        longest_context: at least the largest of ``contexts_R``.
        window: tokens that a query sees, its own the last of them; None is all before it.
        deterministic: see the top of this file.

    Returns:
        [N, H, D], contiguous, same dtype.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.

    Block ids, starts and contexts are not checked on the device; wrong ones read foreign memory.
    """
    _check(q_NHD, starts_R1, tables_RB, contexts_R, pool_P2GTD)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive or None, got {window}")
    N, H, D = q_NHD.shape
    R, B = tables_RB.shape
    G, block_tokens = pool_P2GTD.shape[2:4]
    if not 0 <= longest_run <= longest_context <= B * block_tokens:
        raise ValueError(
            f"longest_run {longest_run} must be at most longest_context {longest_context}, and "
            f"that at most the {B} * {block_tokens} tokens of a block table"
        )
    codec, codes_P2GTD, scales_P2GT = parts_of(pool_P2GTD, q_NHD.dtype)
    out_NHD = q_NHD.new_empty((N, H, D))
    if N == 0:
        return out_NHD
    heads_per_group = H // G
    rows = longest_run * heads_per_group
    windowed, window = window is not None, window or 0
    kind = {"windowed": windowed, "coded": codec != PLAIN}
    decode = decode_tiles(q_NHD.dtype, D, **kind)
    prefill = prefill_tiles(q_NHD.dtype, D, deterministic=deterministic, **kind)
    tiles = prefill if rows > decode.rows else decode
    strides = (*q_NHD.stride()[:2], tables_RB.stride(0), *pool_P2GTD.stride()[:4])
    constants = {
        "HEADS_PER_GROUP": heads_per_group,
        "BLOCK_TOKENS": block_tokens,
        "D": D,
        "SPLIT_TOKENS": SPLIT_TOKENS,
        "WINDOWED": windowed,
        "CODEC": codec,
        "INTERPRETED": q_NHD.device.type == "cpu",
    }
    if longest_run > 1 or longest_context <= SPLIT_TOKENS:
        prefill_attention_kernel[(triton.cdiv(rows, tiles.rows), G, R)](
            q_NHD,
            starts_R1,
            tables_RB,
            contexts_R,
            codes_P2GTD,
            scales_P2GT,
            out_NHD,
            *strides,
            scale * _LOG2_E,
            window,
            WHOLE=tiles != decode,
            **constants,
            **_shape(tiles),
            **OPTIONS,
        )
        return out_NHD
    S = triton.cdiv(longest_context, SPLIT_TOKENS)
    like_parts = q_NHD.new_empty(0, dtype=torch.float32)
    peaks_RSH, sums_RSH = like_parts.new_empty((2, R, S, H)).unbind()
    outs_RSHD = like_parts.new_empty((R, S, H, D))
    decode_attention_kernel[(S * triton.cdiv(heads_per_group, decode.rows), G, R)](
        q_NHD,
        tables_RB,
        contexts_R,
        codes_P2GTD,
        scales_P2GT,
        peaks_RSH,
        sums_RSH,
        outs_RSHD,
        *strides,
        S,
        scale * _LOG2_E,
        window,
        **constants,
        **_shape(decode),
        **OPTIONS,
    )
    join_splits_kernel[(H, R)](
        contexts_R,
        peaks_RSH,
        sums_RSH,
        outs_RSHD,
        out_NHD,
        S,
        window,
        D=D,
        SPLIT_TOKENS=SPLIT_TOKENS,
        WINDOWED=windowed,
        num_warps=1,
        **OPTIONS,
    )
    return out_NHD


def paged_attention_reference(
    q_NHD: torch.Tensor,
    starts_R1: torch.Tensor,
    tables_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    pool_P2GTD: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """What ``paged_attention`` means."""
    G = pool_P2GTD.shape[2]
    out_NHD = torch.zeros_like(q_NHD)
    for r, (start, end) in enumerate(
        zip(starts_R1[:-1].tolist(), starts_R1[1:].tolist(), strict=True)
    ):
        context = int(contexts_R[r])
        # [2, G, B * T, D]: the run's blocks, in order, as one stretch of tokens
        kv_B2GTD = kv_codec.taken(pool_P2GTD, tables_RB[r].long())
        kv = kv_B2GTD.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        q_GHD = q_NHD[start:end].float().unflatten(1, (G, -1)).transpose(0, 1).transpose(1, 2)
        scores = q_GHD @ kv[0].unsqueeze(1).transpose(2, 3) * scale
        prefix = context - (end - start)
        every = torch.ones(end - start, context, dtype=torch.bool)
        hidden = every.triu(prefix + 1)
        if window is not None:
            hidden |= every.tril(prefix - window)
        weights = scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(dim=-1)
        out = weights @ kv[1].unsqueeze(1)  # [G, H/G, tokens, D]
        out_NHD[start:end] = out.permute(2, 0, 1, 3).flatten(1, 2).to(q_NHD.dtype)
    return out_NHD


def _shape(tiles: Tiles) -> dict[str, int]:
    return {
        "ROWS": tiles.rows,
        "TOKENS": tiles.tokens,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _check(
    q_NHD: torch.Tensor,
    starts_R1: torch.Tensor,
    tables_RB: torch.Tensor,
    contexts_R: torch.Tensor,
    pool_P2GTD: torch.Tensor,
) -> None:
    shapes = (
        f"q {tuple(q_NHD.shape)}, starts {tuple(starts_R1.shape)}, tables "
        f"{tuple(tables_RB.shape)}, contexts {tuple(contexts_R.shape)}, pool "
        f"{tuple(pool_P2GTD.shape)}"
    )
    if q_NHD.ndim != 3 or tables_RB.ndim != 2 or pool_P2GTD.ndim != 5:
        raise ValueError(f"q must be [N, H, D], tables [R, B], pool [P, 2, G, T, D]: {shapes}")
    R = tables_RB.shape[0]
    H, D = q_NHD.shape[1:]
    if starts_R1.shape != (R + 1,) or contexts_R.shape != (R,):
        raise ValueError(f"starts must be [R + 1] and contexts [R]: {shapes}")
    if pool_P2GTD.shape[1] != 2 or pool_P2GTD.shape[4] != D or H % pool_P2GTD.shape[2]:
        raise ValueError(f"D must agree and H be a multiple of G: {shapes}")
    if D not in (16, 32, 64, 128, 256):
        raise ValueError(f"head_dim must be 16, 32, 64, 128 or 256, got {D}")
    if q_NHD.dtype not in DTYPES:
        raise ValueError(f"q must be one of {DTYPES}, got {q_NHD.dtype}")
    for name, tensor in (("starts", starts_R1), ("tables", tables_RB), ("contexts", contexts_R)):
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 with contiguous rows, got {tensor.dtype}")
    if q_NHD.stride(2) != 1 or pool_P2GTD.stride(4) != 1:
        raise ValueError(
            f"channels must be contiguous, got strides {q_NHD.stride()} in q and "
            f"{pool_P2GTD.stride()} in the pool"
        )
    devices = {t.device for t in (q_NHD, starts_R1, tables_RB, contexts_R, pool_P2GTD)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {devices}")


def configurations() -> Iterator[Configuration]:
    for dtype in DTYPES:
        for D in HEAD_DIMS:
            yield from _configurations(dtype, D, heads=32, groups=8)
            yield from _configurations(dtype, D, heads=32, groups=8, windowed=True)
    yield from _configurations(torch.bfloat16, 64, heads=9, groups=3)
    for stored in CODECS:
        for D in HEAD_DIMS:
            for windowed in (False, True):
                yield from _configurations(
                    torch.bfloat16, D, heads=32, groups=8, windowed=windowed, stored=stored
                )
        yield from _configurations(torch.float16, 128, heads=32, groups=8, stored=stored)


def _configurations(
    dtype: torch.dtype,
    D: int,
    *,
    heads: int,
    groups: int,
    windowed: bool = False,
    stored: torch.dtype | None = None,
) -> Iterator[Configuration]:
    """``stored``: the pool's dtype where it holds codes."""
    block_tokens = 16
    head_elements = block_tokens * D + (block_tokens * 2 if stored else 0)
    arguments: dict[str, torch.dtype | int | float] = {
        "q_ptr": dtype,
        "starts_ptr": torch.int32,
        "tables_ptr": torch.int32,
        "contexts_ptr": torch.int32,
        "pool_ptr": dtype if stored is None else POINTERS[stored],
        "scales_ptr": dtype if stored is None else torch.bfloat16,
        "out_ptr": dtype,
        "q_stride_n": heads * D,
        "q_stride_h": D,
        "tables_stride_r": 512,
        "pool_stride_p": 32 * 2 * groups * head_elements,
        "pool_stride_2": groups * head_elements,
        "pool_stride_g": head_elements,
        "pool_stride_t": D,
        "scale_log2": 0.18,
        "window": 1000,
    }
    parts = dict.fromkeys(("peaks_ptr", "sums_ptr", "outs_ptr"), torch.float32)
    constants = {
        "HEADS_PER_GROUP": heads // groups,
        "BLOCK_TOKENS": block_tokens,
        "D": D,
        "SPLIT_TOKENS": SPLIT_TOKENS,
        "WINDOWED": windowed,
        "CODEC": CODECS.get(stored, PLAIN),
        "INTERPRETED": False,
    }
    suffix = (" windowed" if windowed else "") + (f" {stored}" if stored else "")
    kind = {"windowed": windowed, "coded": stored is not None}
    ways = {
        "decode": decode_tiles(dtype, D, **kind),
        "prefill": prefill_tiles(dtype, D, deterministic=True, **kind),
    }
    if dtype != torch.float32 and stored is None:
        ways["fast prefill"] = prefill_tiles(dtype, D, deterministic=False)
    for way, tiles in ways.items():
        options = _shape(tiles)
        shape: dict[str, int | bool] = {name: options.pop(name) for name in ("ROWS", "TOKENS")}
        kernel = decode_attention_kernel if way == "decode" else prefill_attention_kernel
        available = {**arguments, **parts, "S": 16}
        if kernel is prefill_attention_kernel:
            shape["WHOLE"] = tiles != ways["decode"]
        yield Configuration(
            kernel,
            f"{way}_attention H={heads} G={groups} D={D}{suffix}",
            {name: available[name] for name in kernel.arg_names if name in available},
            {**constants, **shape},
            options,
        )
    if stored is not None:
        return  # the join does not see the pool
    yield Configuration(
        join_splits_kernel,
        f"join_splits D={D}{suffix}",
        {"contexts_ptr": torch.int32, **parts, "out_ptr": dtype, "S": 16, "window": 1000},
        {"D": D, "SPLIT_TOKENS": SPLIT_TOKENS, "WINDOWED": windowed},
        {"num_warps": 1},
    )
