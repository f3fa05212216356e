"""Sampling weights as whole numbers: exp((logit - best) / temperature), times 2**44, cut.

``host_weights`` takes NumPy's exponential. It is quick, and unlike from one kind of CPU to another
in its last bit.

``portable_weights`` has the same bits everywhere: a power of two, computed by float32 additions and
multiplications alone, each rounded by itself as IEEE 754 says (no fused multiply-add, no library
function), on every GPU, in Triton's interpreter and in NumPy. ``kernels.sampling`` does the same,
step for step, so that a row which needs the host is drawn there as the device would have drawn it.
In NumPy that takes 4 times as long.

    x = (logit - best) * log2(e) / temperature
    2**x = 2**n * p(x - n),  n = the nearest integer, p of degree 5 with p(0) = 1

p is off by less than 1e-7 of its value; most of the error, 3e-6 for the lightest tokens, is in x.
"""

import math

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
Weights = NDArray[np.int64]

WEIGHT_BITS = 44
"""The best token's weight is 2**44: times a vocabulary of 2**18 it still fits into 63 bits."""

LOWEST_POWER = -64.0
"""Powers of two below 2**-44 are cut to weight 0; so is this one, whose exponent is a normal one.
"""

ROUNDER = 1.5 * 2.0**23
"""Added, it makes of a small float32 the nearest integer, which its lowest bits then hold."""

ROUNDER_BITS = 0x4B40_0000

COEFFICIENTS = (
    0.6931470036506653,
    0.24022242426872253,
    0.05550733953714371,
    0.009671513922512531,
    0.001326472032815218,
)
"""Of x, x**2 and so on: float32 values, fitted to 2**x - 1 between -1/2 and 1/2."""


def power_factor(temperature: float) -> float:
    """What a difference of logits is multiplied with, as a float32 holds it."""
    return float(np.float32(math.log2(math.e) / temperature))


def host_weights(logits_V: Logits, temperature: float) -> Weights:
    best = _finite_best(logits_V)
    weights = logits_V - best
    with np.errstate(over="ignore"):  # a large difference at a low temperature is -inf: weight 0
        weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    weights *= np.float32(2.0**WEIGHT_BITS)
    whole: Weights = weights.astype(np.int64)
    return whole


def portable_weights(logits_V: Logits, temperature: float) -> Weights:
    return weights_by_factor(logits_V, power_factor(temperature))


def weights_by_factor(logits_V: Logits, factor: float) -> Weights:
    """The portable weights under a ``power_factor``."""
    with np.errstate(over="ignore"):  # likewise
        powers = (logits_V - _finite_best(logits_V)) * np.float32(factor)
    np.maximum(powers, np.float32(LOWEST_POWER), out=powers)
    rounded = powers + np.float32(ROUNDER)
    powers -= rounded - np.float32(ROUNDER)
    values = np.zeros_like(powers)
    for coefficient in reversed(COEFFICIENTS):
        values += np.float32(coefficient)
        values *= powers
    values += np.float32(1)
    exponents = rounded.view(np.int32) - np.int32(ROUNDER_BITS - WEIGHT_BITS)
    scaled = (values.view(np.int32) + (exponents << 23)).view(np.float32)
    whole: Weights = scaled.astype(np.int64)
    return whole


def _finite_best(logits_V: Logits) -> np.float32:
    best: np.float32 = logits_V.max()
    assert np.isfinite(best), f"the best logit is {best}: the model failed, or all is forbidden"
    return best
