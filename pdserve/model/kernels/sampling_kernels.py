"""The device code of drawing tokens. ``sampling`` has the idea, the checks and the reference.

Shape letters, in this file:
    R  rows, one per sequence    V  vocabulary    X  tokens of a tile    Z  values of a digit
"""

import triton
import triton.language as tl

from pdserve.model import whole_weights

FACTOR, TOP_K, TOP_P, WEIGHT_MIN, BITS = (tl.constexpr(column) for column in range(5))
SETTINGS = tl.constexpr(5)  # columns

_DIGIT_BITS = tl.constexpr(4)
_VALUES = tl.constexpr(16)  # sums for each token of a tile; more would not fit the registers
_DIGITS = tl.constexpr(8)  # of a key, which is below 2**32
_NOTHING = tl.constexpr(-1)  # a key below all keys, an id below all ids

_WEIGHT_BITS = tl.constexpr(whole_weights.WEIGHT_BITS)
_LOWEST_POWER = tl.constexpr(whole_weights.LOWEST_POWER)
_ROUNDER = tl.constexpr(whole_weights.ROUNDER)
_ROUNDER_BITS = tl.constexpr(whole_weights.ROUNDER_BITS)
_C1, _C2, _C3, _C4, _C5 = (tl.constexpr(value) for value in whole_weights.COEFFICIENTS)


@triton.jit
def _weight(logit_X, best, factor):
    """``whole_weights.weights_by_factor``, operation by operation: int64."""
    power_X = tl.maximum((logit_X - best) * factor, _LOWEST_POWER)
    rounded_X = power_X + _ROUNDER
    x = power_X - (rounded_X - _ROUNDER)
    value_X = ((((_C5 * x + _C4) * x + _C3) * x + _C2) * x + _C1) * x + 1.0
    exponent_X = rounded_X.to(tl.int32, bitcast=True) - (_ROUNDER_BITS - _WEIGHT_BITS)
    bits_X = value_X.to(tl.int32, bitcast=True) + (exponent_X << 23)
    return bits_X.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def _logit_key(logit_X):
    """int64 below 2**32, in the order of the logits."""
    logit_X = tl.where(logit_X == 0.0, 0.0, logit_X)  # -0 is no less than 0
    bits_X = logit_X.to(tl.int32, bitcast=True)
    return (bits_X ^ ((bits_X >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648


@triton.jit
def _weight_key(weight_X):
    """int64 below 2**31, in the order of the weights, which float32 holds exactly."""
    return weight_X.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _missing(total, top_p):
    """The weight that the nucleus must hold."""
    wanted = tl.ceil(total.to(tl.float64) * top_p).to(tl.int64)
    return tl.minimum(tl.maximum(wanted, 1), total)


@triton.jit(do_not_specialize=["V"])
def shortlist_kernel(
    logits_ptr,  # [R, V] float32, rows contiguous
    settings_ptr,  # [R, 5] float64
    ids_ptr,  # [R, V] int32: the tokens that may be drawn, ascending
    counts_ptr,  # [R] int32: how many; 0 where a logit is no number or the best is infinite
    bests_ptr,  # [R] float32
    totals_ptr,  # [R] int64: the weight of all tokens; written only for top-p without top-k
    logits_stride_r,
    V,
    TILE: tl.constexpr,
):
    # Grid: (R,). Program r reads row r two or three times.
    r = tl.program_id(0).to(tl.int64)
    settings_ptr += r * SETTINGS
    factor = tl.load(settings_ptr + FACTOR).to(tl.float32)
    top_k = tl.load(settings_ptr + TOP_K).to(tl.int32)
    top_p = tl.load(settings_ptr + TOP_P)
    weight_min = tl.load(settings_ptr + WEIGHT_MIN).to(tl.int64)
    logits_ptr += r * logits_stride_r
    x = tl.arange(0, TILE)

    peak_X = tl.full([TILE], float("-inf"), tl.float32)
    strange_X = tl.zeros([TILE], tl.int32)
    for start in tl.range(0, V, TILE, num_stages=3):
        logit_X = tl.load(logits_ptr + start + x, mask=start + x < V, other=float("-inf"))
        peak_X = tl.maximum(peak_X, logit_X)
        strange_X = strange_X | (1 - (logit_X <= float("inf")).to(tl.int32))
    best = tl.max(peak_X, axis=0)
    tl.store(bests_ptr + r, best)
    if (tl.max(strange_X, axis=0) > 0) | (tl.abs(best) == float("inf")):
        tl.store(counts_ptr + r, 0)
        return

    # Each place of a tile has its peak: so many different tokens, of which the k-th best is no
    # better than the k-th best of all. Its key is found bit by bit.
    bound = tl.zeros([], tl.int64)
    if (top_k > 0) & (top_k <= TILE):
        peak_key_X = _logit_key(peak_X)
        for step in range(_DIGITS * _DIGIT_BITS):
            trial = bound | (tl.full([], 1, tl.int64) << (_DIGITS * _DIGIT_BITS - 1 - step))
            reached = tl.sum((peak_key_X >= trial).to(tl.int32), axis=0) >= top_k
            bound = tl.where(reached, trial, bound)

    floor = tl.full([], 1, tl.int64)  # lighter tokens are never drawn
    if (top_k == 0) & (top_p < 1.0):
        sum_X = tl.zeros([TILE], tl.int64)
        for start in tl.range(0, V, TILE, num_stages=3):
            logit_X = tl.load(logits_ptr + start + x, mask=start + x < V, other=float("-inf"))
            sum_X += _weight(logit_X, best, factor)
        total = tl.sum(sum_X, axis=0)
        tl.store(totals_ptr + r, total)
        # Were all tokens lighter than this, they could all be left out of the nucleus.
        floor = tl.maximum(floor, (total - _missing(total, top_p)) // V)
    if (top_k == 0) & (top_p >= 1.0):
        floor = tl.maximum(floor, weight_min)

    count = 0
    ids_ptr += r * V
    for start in tl.range(0, V, TILE, num_stages=3):
        logit_X = tl.load(logits_ptr + start + x, mask=start + x < V, other=float("-inf"))
        listed_X = _weight(logit_X, best, factor) >= floor
        listed_X &= _logit_key(logit_X) >= bound
        one_X = listed_X.to(tl.int32)
        tl.store(ids_ptr + count + tl.cumsum(one_X, axis=0) - 1, start + x, mask=listed_X)
        count += tl.sum(one_X, axis=0)
    tl.store(counts_ptr + r, count)


@triton.jit
def _tile(ids_ptr, logits_ptr, start, count, best, factor, TILE: tl.constexpr):
    """(ids, logits, weights) of a tile of the list; behind its end, weights of 0."""
    x = start + tl.arange(0, TILE)
    id_X = tl.load(ids_ptr + x, mask=x < count, other=0)
    logit_X = tl.load(logits_ptr + id_X, mask=x < count, other=float("-inf"))
    return id_X, logit_X, _weight(logit_X, best, factor)


@triton.jit
def _in_front(key_X, id_X, last_key, last_id):
    """Whether a token comes before or is the last, in the order of falling keys, then of ids."""
    return (key_X > last_key) | ((key_X == last_key) & (id_X <= last_id))


@triton.jit
def _last(
    ids_ptr,
    logits_ptr,
    count,
    best,
    factor,
    last_logit_key,  # tokens behind this one, by logit, do not take part; only if BY_WEIGHT
    last_logit_id,
    missing,  # int64, positive, and at most what all tokens hold
    BY_WEIGHT: tl.constexpr,  # keys and amounts are weights; otherwise logits, and 1 each
    TILE: tl.constexpr,
):
    """(key, id) of the last token of the shortest front that holds ``missing``.

    The key is found digit by digit, the highest first: of the tokens that share the digits known so
    far, how much lies on each value of the next? All sums are of integers, and so exact.
    """
    digit_Z = tl.arange(0, _VALUES)
    key = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.int64)  # held by tokens with greater keys
    for step in range(_DIGITS):
        shift = (_DIGITS - 1 - step) * _DIGIT_BITS
        sum_XZ = tl.zeros([TILE, _VALUES], tl.int64)
        for start in range(0, count, TILE):
            id_X, logit_X, weight_X = _tile(
                ids_ptr, logits_ptr, start, count, best, factor, TILE=TILE
            )
            key_X, amount_X = _key_and_amount(
                id_X, logit_X, weight_X, last_logit_key, last_logit_id, BY_WEIGHT=BY_WEIGHT
            )
            known = (key_X >> (shift + _DIGIT_BITS)) == (key >> (shift + _DIGIT_BITS))
            next_X = (key_X >> shift) & (_VALUES - 1)
            here = known[:, None] & (next_X[:, None] == digit_Z[None, :])
            sum_XZ += tl.where(here, amount_X[:, None], 0)
        sum_Z = tl.sum(sum_XZ, axis=0)
        front_Z = above + tl.cumsum(sum_Z, axis=0, reverse=True)
        digit = tl.sum((front_Z >= missing).to(tl.int64), axis=0) - 1
        above += tl.sum(tl.where(digit_Z > digit, sum_Z, 0), axis=0)
        key = key | (digit << shift)

    last_id = tl.full([], _NOTHING, tl.int32)
    for start in range(0, count, TILE):
        id_X, logit_X, weight_X = _tile(ids_ptr, logits_ptr, start, count, best, factor, TILE=TILE)
        key_X, amount_X = _key_and_amount(
            id_X, logit_X, weight_X, last_logit_key, last_logit_id, BY_WEIGHT=BY_WEIGHT
        )
        equal_X = tl.where(key_X == key, amount_X, 0)
        before_X = above + tl.cumsum(equal_X, axis=0) - equal_X
        chosen = (equal_X > 0) & (before_X < missing)
        last_id = tl.maximum(last_id, tl.max(tl.where(chosen, id_X, _NOTHING), axis=0))
        above += tl.sum(equal_X, axis=0)
    return key, last_id


@triton.jit
def _key_and_amount(
    id_X, logit_X, weight_X, last_logit_key, last_logit_id, BY_WEIGHT: tl.constexpr
):
    key_X = _logit_key(logit_X)
    if BY_WEIGHT:
        takes_part = _in_front(key_X, id_X, last_logit_key, last_logit_id)
        return _weight_key(weight_X), tl.where(takes_part, weight_X, 0)
    return key_X, (weight_X > 0).to(tl.int64)


@triton.jit
def _kept_tile(
    ids_ptr,
    logits_ptr,
    start,
    count,
    best,
    factor,
    last_logit_key,
    last_logit_id,
    last_weight_key,
    last_weight_id,
    weight_min,
    TILE: tl.constexpr,
):
    """(ids, weights) of a tile of the list; of tokens that a filter takes away, weights of 0."""
    id_X, logit_X, weight_X = _tile(ids_ptr, logits_ptr, start, count, best, factor, TILE=TILE)
    kept = _in_front(_logit_key(logit_X), id_X, last_logit_key, last_logit_id)
    kept &= _in_front(_weight_key(weight_X), id_X, last_weight_key, last_weight_id)
    return id_X, tl.where(kept & (weight_X >= weight_min), weight_X, 0)


@triton.jit(do_not_specialize=["V"])
def draw_kernel(
    logits_ptr,  # [R, V] float32, rows contiguous
    settings_ptr,  # [R, 5] float64
    ids_ptr,  # [R, V] int32: of each row the listed tokens, ascending
    counts_ptr,  # [R] int32: how many
    bests_ptr,  # [R] float32: the best logit
    totals_ptr,  # [R] int64: the weight of all tokens; read only for top-p without top-k
    tokens_ptr,  # [R] int64: the answer; -1 where nothing is listed
    logits_stride_r,
    V,
    TILE: tl.constexpr,
):
    # Grid: (R,). Program r draws for row r.
    r = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + r)
    if count == 0:
        tl.store(tokens_ptr + r, -1)
        return
    settings_ptr += r * SETTINGS
    factor = tl.load(settings_ptr + FACTOR).to(tl.float32)
    top_k = tl.load(settings_ptr + TOP_K).to(tl.int32)
    top_p = tl.load(settings_ptr + TOP_P)
    weight_min = tl.load(settings_ptr + WEIGHT_MIN).to(tl.int64)
    bits = tl.load(settings_ptr + BITS).to(tl.int64)
    best = tl.load(bests_ptr + r)
    logits_ptr += r * logits_stride_r
    ids_ptr += r * V

    last_logit_key = tl.full([], _NOTHING, tl.int64)
    last_logit_id = tl.full([], _NOTHING, tl.int32)
    if (top_k > 0) & (top_k < count):
        last_logit_key, last_logit_id = _last(
            ids_ptr,
            logits_ptr,
            count,
            best,
            factor,
            last_logit_key,
            last_logit_id,
            top_k.to(tl.int64),
            BY_WEIGHT=False,
            TILE=TILE,
        )

    last_weight_key = tl.full([], _NOTHING, tl.int64)
    last_weight_id = tl.full([], _NOTHING, tl.int32)
    if top_p < 1.0:
        total = tl.zeros([], tl.int64)
        if top_k == 0:
            total = tl.load(totals_ptr + r)
        else:
            for start in range(0, count, TILE):
                id_X, logit_X, weight_X = _tile(
                    ids_ptr, logits_ptr, start, count, best, factor, TILE=TILE
                )
                _, amount_X = _key_and_amount(
                    id_X, logit_X, weight_X, last_logit_key, last_logit_id, BY_WEIGHT=True
                )
                total += tl.sum(amount_X, axis=0)
        last_weight_key, last_weight_id = _last(
            ids_ptr,
            logits_ptr,
            count,
            best,
            factor,
            last_logit_key,
            last_logit_id,
            _missing(total, top_p),
            BY_WEIGHT=True,
            TILE=TILE,
        )

    total = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        _, weight_X = _kept_tile(
            ids_ptr,
            logits_ptr,
            start,
            count,
            best,
            factor,
            last_logit_key,
            last_logit_id,
            last_weight_key,
            last_weight_id,
            weight_min,
            TILE=TILE,
        )
        total += tl.sum(weight_X, axis=0)

    # total * bits / 2**53, of which the product needs up to 115 bits.
    target = tl.umulhi(total.to(tl.uint64), bits.to(tl.uint64) << 11).to(tl.int64)
    token = V.to(tl.int32)
    sum_before = tl.zeros([], tl.int64)
    for start in range(0, count, TILE):
        id_X, weight_X = _kept_tile(
            ids_ptr,
            logits_ptr,
            start,
            count,
            best,
            factor,
            last_logit_key,
            last_logit_id,
            last_weight_key,
            last_weight_id,
            weight_min,
            TILE=TILE,
        )
        reached = (sum_before + tl.cumsum(weight_X, axis=0) > target) & (weight_X > 0)
        token = tl.minimum(token, tl.min(tl.where(reached, id_X, V), axis=0))
        sum_before += tl.sum(weight_X, axis=0)
    tl.store(tokens_ptr + r, token.to(tl.int64))
