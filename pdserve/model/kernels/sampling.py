"""Tokens drawn on the device: temperature, top-k, top-p, min-p and the draw, without a sort.

What is drawn is what ``model.sampler`` draws with portable weights, to the token. They are whole
numbers (``model.whole_weights``), computed by additions and multiplications that are alike
everywhere: their sums have no order, and a random number falls on the same token on any GPU, in any
company.

Two kernels, a program for each row:

* ``shortlist_kernel`` reads the row two or three times and lists the tokens that may be drawn, in
  order of id: with top-k those no worse than a bound that at least k tokens reach, with top-p those
  that are not so light that all of their kind could be left out. Of 128,000 tokens a few thousand
  remain, with top-k hardly more than k; with neither, all that weigh anything.
* ``draw_kernel`` finds the last token of the k best, and the last of the nucleus, digit by digit of
  a key that has the order of the logits or weights (a radix selection: eight passes over the list,
  each adding integers), and of equals by id; then where in the sum of what is kept the random
  number lies. Ties go to the lowest id.

One program reads a row as fast as one multiprocessor can: a GPU is filled by as many rows as it has
of them, and few rows take no less time than many.

Shape letters, in this file:
    R  rows, one per sequence    V  vocabulary
"""

import math
from collections.abc import Iterator

import torch

from pdserve.model.kernels.configuration import OPTIONS, Configuration
from pdserve.model.kernels.sampling_kernels import SETTINGS, draw_kernel, shortlist_kernel
from pdserve.model.philox import UNIFORM_BITS
from pdserve.model.sampler import VOCABULARY_MAX
from pdserve.model.whole_weights import weights_by_factor

_SHORTLIST_TILE = 2048  # 8 tokens for each of 256 threads; also the largest k that has a bound
_DRAW_TILE = 512  # times 16 sums of 64 bits, of which each of 256 threads keeps 32
_WARPS = 8


def drawn_tokens(logits_RV: torch.Tensor, settings_RS: torch.Tensor) -> torch.Tensor:
    """The token of each row that its random number falls on.

    Args:
        logits_RV: [R, V] float32, rows contiguous, V at most ``VOCABULARY_MAX``.
        settings_RS: [R, 5] float64, contiguous, same device: ``power_factor(temperature)``; top-k,
            a whole number, 0 for all; top-p; the least weight, a whole number up to 2**44; the
            random number, a whole one below 2**53.

    Returns:
        [R] int64; -1 where a logit is no number or the best one is infinite.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.

    Settings are not checked on the device; others than these draw anything.
    """
    _check(logits_RV, settings_RS)
    R, V = logits_RV.shape
    tokens_R = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    if R == 0:
        return tokens_R
    ids_RV = torch.empty((R, V), dtype=torch.int32, device=logits_RV.device)
    counts_R = torch.empty(R, dtype=torch.int32, device=logits_RV.device)
    bests_R, totals_R = logits_RV.new_empty(R), torch.empty_like(tokens_R)
    listed = (ids_RV, counts_R, bests_R, totals_R)
    row_stride = logits_RV.stride(0)
    shortlist_kernel[(R,)](
        logits_RV,
        settings_RS,
        *listed,
        row_stride,
        V,
        TILE=_SHORTLIST_TILE,
        num_warps=_WARPS,
        **OPTIONS,
    )
    draw_kernel[(R,)](
        logits_RV,
        settings_RS,
        *listed,
        tokens_R,
        row_stride,
        V,
        TILE=_DRAW_TILE,
        num_warps=_WARPS,
        **OPTIONS,
    )
    return tokens_R


def drawn_tokens_reference(logits_RV: torch.Tensor, settings_RS: torch.Tensor) -> torch.Tensor:
    """What ``drawn_tokens`` means, where the logits are numbers and the best of a row finite."""
    tokens = [_drawn(*row) for row in zip(logits_RV.cpu(), settings_RS.tolist(), strict=True)]
    return torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)


def _drawn(logits_V: torch.Tensor, settings: list[float]) -> int:
    factor, top_k, top_p, weight_min, bits = settings
    weights_V = torch.from_numpy(weights_by_factor(logits_V.numpy(), factor))
    if top_k > 0:
        weights_V[logits_V.argsort(descending=True, stable=True)[int(top_k) :]] = 0
    if top_p < 1:
        heaviest_V = weights_V.argsort(descending=True, stable=True)
        sums_V = weights_V[heaviest_V].cumsum(0)
        missing = max(1, math.ceil(top_p * int(sums_V[-1])))
        weights_V[heaviest_V[1:][sums_V[:-1] >= missing]] = 0
    weights_V[weights_V < weight_min] = 0
    sums_V = weights_V.cumsum(0)
    target = int(sums_V[-1]) * int(bits) >> UNIFORM_BITS
    return int(torch.searchsorted(sums_V, target, right=True))


def _check(logits_RV: torch.Tensor, settings_RS: torch.Tensor) -> None:
    if logits_RV.ndim != 2 or not 0 < logits_RV.shape[1] <= VOCABULARY_MAX:
        raise ValueError(
            f"logits must be [R, V] with 0 < V <= {VOCABULARY_MAX}, got {tuple(logits_RV.shape)}"
        )
    if logits_RV.dtype != torch.float32 or logits_RV.stride(1) != 1:
        raise ValueError(
            f"logits must be float32 with contiguous rows, got {logits_RV.dtype} with strides "
            f"{logits_RV.stride()}"
        )
    if (
        settings_RS.shape != (logits_RV.shape[0], SETTINGS.value)
        or settings_RS.dtype != torch.float64
        or settings_RS.device != logits_RV.device
        or not settings_RS.is_contiguous()
    ):
        raise ValueError(
            f"settings must be contiguous [{logits_RV.shape[0]}, {SETTINGS.value}] float64 on "
            f"{logits_RV.device}, got {tuple(settings_RS.shape)} {settings_RS.dtype} on "
            f"{settings_RS.device}"
        )


def configurations() -> Iterator[Configuration]:
    listed = {
        "ids_ptr": torch.int32,
        "counts_ptr": torch.int32,
        "bests_ptr": torch.float32,
        "totals_ptr": torch.int64,
    }
    given = {"logits_ptr": torch.float32, "settings_ptr": torch.float64, **listed}
    for kernel, name, pointers, tile in (
        (shortlist_kernel, "shortlist", given, _SHORTLIST_TILE),
        (draw_kernel, "draw", {**given, "tokens_ptr": torch.int64}, _DRAW_TILE),
    ):
        yield Configuration(
            kernel,
            name,
            {**pointers, "logits_stride_r": 128_256, "V": 128_256},
            {"TILE": tile},
            {"num_warps": _WARPS},
        )
