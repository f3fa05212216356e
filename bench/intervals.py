"""How sure a ratio of two servers is: a bootstrap over stretches of time.

Requests of one run are not independent: one long prompt delays everybody who arrives behind it. So
what is drawn again and again, with replacement, are not requests but *blocks*: everything that
arrived within the same stretch of the same load. Both servers had the same arrivals, therefore each
draw takes the same blocks of both; what a block has in common cancels out of the ratio.

Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", chapter 8 (dependent data).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bench.peers.mixed_load import Outcome

Floats = NDArray[np.float64]

BLOCK_S = 20.0  # several times what a long prompt takes
DRAWS = 1000
OUTSIDE = 0.05  # the part of all draws that the interval leaves out, half at either end


def blocks(
    runs: Sequence[Sequence[Outcome]],
    samples: Callable[[Outcome], Iterable[float]],
    block_s: float = BLOCK_S,
) -> list[Floats]:
    """The samples of each stretch of each run, in order; some may be empty."""
    found: list[list[float]] = []
    for outcomes in runs:
        of_run: list[list[float]] = [
            [] for _ in range(1 + max(int(o.due_s // block_s) for o in outcomes))
        ]
        for outcome in outcomes:
            of_run[int(outcome.due_s // block_s)].extend(samples(outcome))
        found.extend(of_run)
    return [np.array(block, dtype=np.float64) for block in found]


def at_percentile(at: float) -> Callable[[Floats], float]:
    """The statistic that ``frame.percentile`` computes."""
    return partial(_percentile, at=at)


def _percentile(samples: Floats, at: float) -> float:
    return float(np.quantile(samples, at, method="inverted_cdf"))


def mean(samples: Floats) -> float:
    return float(samples.mean())


def ratio_interval(
    ours: Sequence[Floats],
    theirs: Sequence[Floats],
    statistic: Callable[[Floats], float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float]:
    """Between what lies statistic(ours) / statistic(theirs), with 95 % of the draws.

    Args:
        ours: one array per block; along their first axis the samples of all blocks are one array.
        theirs: the same blocks of the other server.
    """
    assert len(ours) == len(theirs) > 0, f"{len(ours)} and {len(theirs)} blocks"
    chance = np.random.default_rng(seed)
    ratios = []
    for _ in range(draws):
        drawn = chance.integers(len(ours), size=len(ours))
        our_samples = np.concatenate([ours[index] for index in drawn])
        their_samples = np.concatenate([theirs[index] for index in drawn])
        if len(our_samples) and len(their_samples):  # else the blocks drawn are all empty
            ratios.append(statistic(our_samples) / statistic(their_samples))
    low, high = np.quantile(ratios, [OUTSIDE / 2, 1 - OUTSIDE / 2])
    return float(low), float(high)
