"""The device code of paged attention. ``attention`` has the idea, the checks and the reference.

Shape letters, in this file:
    N  tokens of the batch    R  runs: one per sequence    B  blocks of the longest table
    H  query heads            G  key/value heads           D  channels of a head
    P  blocks of the pool     T  tokens of a block         S  splits of the longest context
    Y  rows of a tile: queries * heads of one group        X  tokens of a tile
"""

import triton
import triton.language as tl

from pdserve.model.kernels.codec import decoded
from pdserve.model.kernels.products import dot as _dot


@triton.jit
def _attend_split(
    q_YD,
    position_Y,  # absolute position of each row's query
    split_start,  # absolute position of the split's first token
    split_end,  # of the last token that any row may see, plus 1, within the split
    begin,  # of the first token that any row may see
    window,  # tokens a row sees, its own the last of them; only if WINDOWED
    table_ptr,  # [B] int32: this run's blocks
    pool_ptr,  # [P, 2, G, T, D], at this kv head: the keys of its first block
    scales_ptr,  # [P, 2, G, T] bfloat16, likewise, strides half of the pool's; only with a CODEC
    pool_stride_p,
    pool_stride_2,
    pool_stride_t,
    scale_log2,  # scale * log2(e): softmax in powers of two
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CODEC: tl.constexpr,  # of ``codec``
    INTERPRETED: tl.constexpr,
):
    """(peak [Y], sum [Y], unnormalised output [Y, D]) of one split. A row that sees nothing of it
    has peak -inf, sum 0 and output 0."""
    d = tl.arange(0, D)
    peak_Y = tl.full([ROWS], float("-inf"), tl.float32)
    sum_Y = tl.zeros([ROWS], tl.float32)
    out_YD = tl.zeros([ROWS, D], tl.float32)
    if WINDOWED:
        # Tiles stand at absolute positions, whatever the rows see of the first.
        split_start = tl.maximum(split_start, begin // TOKENS * TOKENS)
    for tile_start in range(split_start, split_end, TOKENS):
        t = tile_start + tl.arange(0, TOKENS)
        # What lies beyond the context was never written and may be NaN; 0 * NaN would spread it.
        written = t < split_end
        if WINDOWED:
            written = written & (t >= begin)
        block = tl.load(table_ptr + t // BLOCK_TOKENS, mask=written, other=0).to(tl.int64)
        # 64-bit offsets: the pool passes 2**31 elements at 4 GiB of bf16.
        place = block * pool_stride_p + t % BLOCK_TOKENS * pool_stride_t
        k_ptr = pool_ptr + place[None, :] + d[:, None]
        k_DX = tl.load(k_ptr, mask=written[None, :], other=0)
        v_ptr = pool_ptr + pool_stride_2 + place[:, None] + d[None, :]
        v_XD = tl.load(v_ptr, mask=written[:, None], other=0)
        if CODEC:
            # Codes are exact in the model's dtype: they are multiplied, and scales go to the sums.
            scale_ptr = scales_ptr + block * (pool_stride_p // 2) + t % BLOCK_TOKENS
            k_scale_X = tl.load(scale_ptr, mask=written, other=0.0).to(tl.float32)
            scale_ptr += pool_stride_2 // 2
            v_scale_X = tl.load(scale_ptr, mask=written, other=0.0).to(tl.float32)
            k_DX = decoded(k_DX, CODEC).to(q_YD.dtype)
            v_XD = decoded(v_XD, CODEC)
            # A weight times its scale may be too small for float16.
            v_XD = v_XD.to(tl.bfloat16 if q_YD.dtype == tl.float16 else q_YD.dtype)

        score_YX = _dot(q_YD, k_DX, tl.zeros([ROWS, TOKENS], tl.float32), INTERPRETED)
        if CODEC:
            score_YX = score_YX * k_scale_X[None, :]
        if WINDOWED:
            # Unsigned: what comes after the row is a large number.
            visible = (position_Y[:, None] - t[None, :]).to(tl.uint32, bitcast=True) < window
        else:
            visible = t[None, :] <= position_Y[:, None]
        score_YX = tl.where(visible, score_YX, float("-inf"))
        new_peak_Y = tl.maximum(peak_Y, tl.max(score_YX, axis=1) * scale_log2)
        # A row that has seen nothing yet has no peak; -inf - -inf would be NaN.
        base_Y = tl.where(new_peak_Y == float("-inf"), 0.0, new_peak_Y)
        weight_YX = tl.exp2(tl.fma(score_YX, scale_log2, -base_Y[:, None]))
        decay_Y = tl.exp2(peak_Y - base_Y)
        sum_Y = tl.fma(sum_Y, decay_Y, tl.sum(weight_YX, axis=1))
        if CODEC:
            weight_YX = weight_YX * v_scale_X[None, :]
        out_YD = _dot(weight_YX.to(v_XD.dtype), v_XD, out_YD * decay_Y[:, None], INTERPRETED)
        peak_Y = new_peak_Y
    return peak_Y, sum_Y, out_YD


@triton.jit
def _join(peak, total, split_peak, split_total):
    """Two neighbouring stretches of KV as one: (peak, sum, and the factors of the two outputs)."""
    new_peak = tl.maximum(peak, split_peak)
    # A row whose window begins later has no peak in either; -inf - -inf would be NaN.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = tl.exp2(peak - base)
    split_decay = tl.exp2(split_peak - base)
    return new_peak, tl.fma(total, decay, split_total * split_decay), decay, split_decay


@triton.jit(do_not_specialize=["tables_stride_r", "window"])
def prefill_attention_kernel(
    q_ptr,  # [N, H, D], each head's channels contiguous
    starts_ptr,  # [R + 1] int32: run r owns tokens [starts[r], starts[r + 1])
    tables_ptr,  # [R, B] int32, rows contiguous
    contexts_ptr,  # [R] int32: tokens of each run that have KV, its own included
    pool_ptr,  # [P, 2, G, T, D] of one layer, channels contiguous
    scales_ptr,  # [P, 2, G, T] bfloat16, strides half of the pool's; only with a CODEC
    out_ptr,  # [N, H, D], contiguous
    q_stride_n,
    q_stride_h,
    tables_stride_r,
    pool_stride_p,
    pool_stride_2,  # from keys to values
    pool_stride_g,
    pool_stride_t,
    scale_log2,
    window,  # tokens a query sees, its own the last of them; only if WINDOWED
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,  # the context is one split, however long it is
    WINDOWED: tl.constexpr,
    CODEC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Grid: (ceil(longest_run * heads_per_group / ROWS), G, R). Program (i, g, r) does tile i, from
    # the last on, of the rows of run r and kv head g: the last see the most, and what begins last
    # should be short. Programs past the end of a short run leave at once.
    g = tl.program_id(1)
    r = tl.program_id(2)
    first_token = tl.load(starts_ptr + r)
    run_tokens = tl.load(starts_ptr + r + 1) - first_token
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    if first_row >= run_tokens * HEADS_PER_GROUP:
        return
    context = tl.load(contexts_ptr + r)
    row = first_row + tl.arange(0, ROWS)
    query = row // HEADS_PER_GROUP
    real = query < run_tokens
    # Rows that pad the tile see what the last one sees, so that no arithmetic on them is undefined.
    position_Y = context - run_tokens + tl.minimum(query, run_tokens - 1)
    # 64-bit offsets: n * stride passes 2**31 elements at 350,000 tokens of 48 heads of 128.
    n = (first_token + query).to(tl.int64)
    h = g * HEADS_PER_GROUP + row % HEADS_PER_GROUP
    d = tl.arange(0, D)
    q_tile_ptr = q_ptr + (n * q_stride_n + h * q_stride_h)[:, None] + d[None, :]
    q_YD = tl.load(q_tile_ptr, mask=real[:, None], other=0.0)

    begin = 0
    if WINDOWED:
        begin = tl.maximum(tl.min(position_Y, axis=0) - window + 1, 0)
    end = tl.max(position_Y, axis=0) + 1
    table_ptr = tables_ptr + r.to(tl.int64) * tables_stride_r
    if WHOLE:
        # One sum for all splits: nothing to join, and half of the registers.
        peak_Y, sum_Y, out_YD = _attend_split(
            q_YD,
            position_Y,
            0,
            end,
            begin,
            window,
            table_ptr,
            pool_ptr + g * pool_stride_g,
            scales_ptr + g * (pool_stride_g // 2),
            pool_stride_p,
            pool_stride_2,
            pool_stride_t,
            scale_log2,
            BLOCK_TOKENS,
            D,
            ROWS,
            TOKENS,
            WINDOWED,
            CODEC,
            INTERPRETED,
        )
    else:
        peak_Y = tl.full([ROWS], float("-inf"), tl.float32)
        sum_Y = tl.zeros([ROWS], tl.float32)
        out_YD = tl.zeros([ROWS, D], tl.float32)
        for split_start in range(begin // SPLIT_TOKENS * SPLIT_TOKENS, end, SPLIT_TOKENS):
            split_peak_Y, split_sum_Y, split_out_YD = _attend_split(
                q_YD,
                position_Y,
                split_start,
                tl.minimum(split_start + SPLIT_TOKENS, end),
                begin,
                window,
                table_ptr,
                pool_ptr + g * pool_stride_g,
                scales_ptr + g * (pool_stride_g // 2),
                pool_stride_p,
                pool_stride_2,
                pool_stride_t,
                scale_log2,
                BLOCK_TOKENS,
                D,
                ROWS,
                TOKENS,
                WINDOWED,
                CODEC,
                INTERPRETED,
            )
            peak_Y, sum_Y, decay_Y, split_decay_Y = _join(peak_Y, sum_Y, split_peak_Y, split_sum_Y)
            out_YD = tl.fma(out_YD, decay_Y[:, None], split_out_YD * split_decay_Y[:, None])
    out_YD = out_YD / sum_Y[:, None]
    out_tile_ptr = out_ptr + ((n * tl.num_programs(1) * HEADS_PER_GROUP + h) * D)[:, None]
    tl.store(out_tile_ptr + d[None, :], out_YD.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["tables_stride_r", "S", "window"])
def decode_attention_kernel(
    q_ptr,  # [R, H, D], each head's channels contiguous
    tables_ptr,  # [R, B] int32, rows contiguous
    contexts_ptr,  # [R] int32: tokens of each run that have KV, its own included
    pool_ptr,  # [P, 2, G, T, D] of one layer, channels contiguous
    scales_ptr,  # [P, 2, G, T] bfloat16, strides half of the pool's; only with a CODEC
    peaks_ptr,  # [R, S, H] float32, contiguous
    sums_ptr,  # [R, S, H] float32, contiguous
    outs_ptr,  # [R, S, H, D] float32, contiguous
    q_stride_n,
    q_stride_h,
    tables_stride_r,
    pool_stride_p,
    pool_stride_2,
    pool_stride_g,
    pool_stride_t,
    S,
    scale_log2,
    window,  # tokens a query sees, its own the last of them; only if WINDOWED
    HEADS_PER_GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CODEC: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Grid: (S * ceil(heads_per_group / ROWS), G, R). Program (s + S * i, g, r) leaves split s of
    # row tile i of run r and kv head g in memory; splits past the end of a context, or before its
    # window, leave at once.
    s = tl.program_id(0) % S
    g = tl.program_id(1)
    r = tl.program_id(2).to(tl.int64)
    context = tl.load(contexts_ptr + r)
    split_start = s * SPLIT_TOKENS
    if split_start >= context:
        return
    begin = 0
    if WINDOWED:
        begin = tl.maximum(context - window, 0)
        if split_start + SPLIT_TOKENS <= begin:
            return
    row = tl.program_id(0) // S * ROWS + tl.arange(0, ROWS)
    real = row < HEADS_PER_GROUP
    h = g * HEADS_PER_GROUP + row
    d = tl.arange(0, D)
    q_tile_ptr = q_ptr + r * q_stride_n + (h * q_stride_h)[:, None] + d[None, :]
    q_YD = tl.load(q_tile_ptr, mask=real[:, None], other=0.0)
    peak_Y, sum_Y, out_YD = _attend_split(
        q_YD,
        tl.zeros([ROWS], tl.int32) + (context - 1),
        split_start,
        tl.minimum(split_start + SPLIT_TOKENS, context),
        begin,
        window,
        tables_ptr + r * tables_stride_r,
        pool_ptr + g * pool_stride_g,
        scales_ptr + g * (pool_stride_g // 2),
        pool_stride_p,
        pool_stride_2,
        pool_stride_t,
        scale_log2,
        BLOCK_TOKENS,
        D,
        ROWS,
        TOKENS,
        WINDOWED,
        CODEC,
        INTERPRETED,
    )
    part = (r * S + s) * tl.num_programs(1) * HEADS_PER_GROUP + h
    tl.store(peaks_ptr + part, peak_Y, mask=real)
    tl.store(sums_ptr + part, sum_Y, mask=real)
    tl.store(outs_ptr + part[:, None] * D + d[None, :], out_YD, mask=real[:, None])


@triton.jit(do_not_specialize=["S", "window"])
def join_splits_kernel(
    contexts_ptr,  # [R] int32
    peaks_ptr,  # [R, S, H] float32, contiguous
    sums_ptr,  # [R, S, H] float32, contiguous
    outs_ptr,  # [R, S, H, D] float32, contiguous
    out_ptr,  # [R, H, D], contiguous
    S,
    window,
    D: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    # Grid: (H, R). Program (h, r) joins the splits of one head, in ascending order.
    H = tl.num_programs(0)
    h = tl.program_id(0)
    r = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D)
    context = tl.load(contexts_ptr + r)
    first_split = 0
    if WINDOWED:
        first_split = tl.maximum(context - window, 0) // SPLIT_TOKENS
    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out_D = tl.zeros([D], tl.float32)
    # Eight at a time, so that what they read is on its way together: a context of 131,072 tokens
    # has 256 splits, and one after the other would wait for memory as long as attention takes.
    for s in tl.range(first_split, tl.cdiv(context, SPLIT_TOKENS), loop_unroll_factor=8):
        # [1]: a row of its own width, so that this is the arithmetic of the rows in a tile.
        part = (r * S + s) * H + h + tl.arange(0, 1)
        split_out_D = tl.load(outs_ptr + ((r * S + s) * H + h) * D + d)
        peak, total, decay, split_decay = _join(
            peak, total, tl.load(peaks_ptr + part), tl.load(sums_ptr + part)
        )
        out_D = tl.fma(out_D, decay, split_out_D * split_decay)
    tl.store(out_ptr + (r * H + h) * D + d, (out_D / total).to(out_ptr.dtype.element_ty))
