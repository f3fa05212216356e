"""Whether drafts are worth writing, where writing them takes time of its own. Pure.

Looking a draft up is free; a model that writes one is waited for:

    a step with n streams and no drafts      n tokens                    in us(n)
    with drafts up to a depth k, d of them   n + the drafts that hold    in us(n + d) + k passes

All streams are written to the same depth, since a pass takes them all. Which of the drafts a step
then takes is as before (``speculation``): their time is spent.

Who does not draft learns nothing, so from time to time it is tried all the same: after one step
without, after two, after four and so on, and at least every ``TRY_STEPS_MAX`` steps. A draft model
that pays is so found within its first few tries; one that does not costs a pass or two, and the
reading of what was said meanwhile, in as many steps.
"""

from collections.abc import Callable, Sequence

from pdserve.decode.speculation import GAIN_MIN_RATIO, counts_that_pay

TRY_STEPS_MAX = 64
TRY_DEPTH = 2
"""The second is a pass over one token of each stream, which is what has to be measured."""

StepUs = Callable[[int], float | None]
"""What a step, or a pass of the draft model, over so many rows takes; None: not known."""


def depth_that_pays(
    chances: Sequence[float], limits: Sequence[int], step_us: StepUs, pass_us: StepUs
) -> int:
    """To how many drafts per stream to write for the most tokens per second; 0: none pays.

    Args:
        chances: that a stream's next draft holds, in [0, 1].
        limits: drafts that each stream has room for.
    """
    plain_us = step_us(len(chances))
    if plain_us is None:
        return 0
    best_rate, best_depth, writing_us = GAIN_MIN_RATIO * len(chances) / plain_us, 0, 0.0
    for depth in range(1, max(limits, default=0) + 1):
        one_pass_us = pass_us(sum(limit >= depth for limit in limits))
        if one_pass_us is None:
            break
        writing_us += one_pass_us
        offered = [min(limit, depth) for limit in limits]
        counts = counts_that_pay(chances, offered, step_us)
        us = step_us(len(chances) + sum(counts))
        assert us is not None, "fewer rows are known"
        rate = tokens_of(chances, counts) / (us + writing_us)
        if rate > best_rate:
            best_rate, best_depth = rate, depth
    return best_depth


def tokens_of(chances: Sequence[float], counts: Sequence[int]) -> float:
    """Expected of a step: each stream's next, and its drafts up to the first that does not hold."""
    return sum(
        chance**place
        for chance, count in zip(chances, counts, strict=True)
        for place in range(count + 1)
    )


class Tries:
    """When to draft although it does not seem to pay."""

    def __init__(self) -> None:
        self._interval = 1
        self._steps = 0

    def depth(self, paying: int) -> int:
        """Of the next step: ``paying`` where that is not 0, else that of a try, or 0."""
        if paying:
            self._interval, self._steps = 1, 0
            return paying
        self._steps += 1
        if self._steps < self._interval:
            return 0
        self._interval, self._steps = min(2 * self._interval, TRY_STEPS_MAX), 0
        return TRY_DEPTH
