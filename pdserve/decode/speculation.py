"""How many drafts a step takes: as many as make tokens come sooner. Pure.

    a step with n streams and no drafts     n tokens                    in us(n)
    the same with d drafts                  n + the drafts that hold    in us(n + d)

Both sides are learned. *Which drafts hold*: each stream keeps the part of its drafts that did, the
recent ones for more. A draft that was not computed is held against the token that came instead, so
a stream whose drafts are left out shows all the same when they begin to be right; no step is spent
on finding out. *What a step takes* is measured by rows, in steps that streams have to themselves.
Beside a prompt's chunk the same counts are taken: there a row costs no more, and a step, being
longer, is worth sparing more.

A time that was not measured for ``FORGET_STEPS`` steps is forgotten. Then the next step without
drafts, or the next with drafts that are likely enough, measures it again: what has changed since,
or was measured in a bad moment, is noticed.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.decode.drafting import Drafter

CHANCE_AT_FIRST = 0.25
CHANCE_AT_FIRST_WEIGHT = 2.0
"""In drafts: two that hold outweigh it, and one that does not hold is hardly a loss."""

CHANCE_KEPT = 0.9
"""Of earlier drafts, per draft: the last ten or so count."""

STEP_NEWS = 0.25
"""Weight of a new measurement beside all before."""

STEP_OUTLIER_RATIO = 2.0
"""A step that takes so much longer than usual waited for something else; it counts as this."""

FORGET_STEPS = 256

ROW_COST_AT_FIRST = 0.25
"""Of a step's time, what as many rows again are believed to add before it is measured. High, so
that only likely drafts are the first."""

GAIN_MIN_RATIO = 1.05
"""Less is within what measurements err by."""


class Chance:
    """How likely it is that one stream's next draft holds, given that those before it did."""

    def __init__(self, at_first: float = CHANCE_AT_FIRST) -> None:
        self._held = at_first * CHANCE_AT_FIRST_WEIGHT
        self._tried = CHANCE_AT_FIRST_WEIGHT

    @property
    def value(self) -> float:
        return self._held / self._tried

    def saw(self, *, held: bool) -> None:
        self._held = CHANCE_KEPT * self._held + held
        self._tried = CHANCE_KEPT * self._tried + 1


class StepTimes:
    """How long a step of so many rows takes, in microseconds."""

    def __init__(self) -> None:
        self._us: dict[int, float] = {}
        self._measured_at: dict[int, int] = {}
        self._steps = 0

    def measured(self, rows: int, elapsed_us: int) -> None:
        self._steps += 1
        elapsed_us = max(1, elapsed_us)  # a coarse clock's step
        before = self._us.get(rows)
        if before is None:
            self._us[rows] = float(elapsed_us)
        else:
            news = min(elapsed_us, STEP_OUTLIER_RATIO * before) - before
            self._us[rows] = before + STEP_NEWS * news
        # In order of measurement: the first is the oldest.
        self._measured_at.pop(rows, None)
        self._measured_at[rows] = self._steps
        for oldest, step in list(self._measured_at.items()):
            if self._steps - step < FORGET_STEPS:
                break
            del self._us[oldest], self._measured_at[oldest]

    def estimate(self) -> Callable[[int], float | None]:
        """By rows; None: nothing is known of so few."""
        known = sorted(self._us)

        def us(rows: int) -> float | None:
            above = bisect_left(known, rows)
            if above < len(known) and known[above] == rows:
                return self._us[rows]
            if above == 0:
                return None
            low = known[above - 1]
            if above == len(known):
                return self._us[low] * (1 + ROW_COST_AT_FIRST * (rows - low) / low)
            high = known[above]
            part = (rows - low) / (high - low)
            return self._us[low] + part * (self._us[high] - self._us[low])

        return us


def counts_that_pay(
    chances: Sequence[float], offered: Sequence[int], us: Callable[[int], float | None]
) -> list[int]:
    """How many drafts of each stream to take for the most tokens per second.

    Args:
        chances: of each stream, in [0, 1].
        offered: drafts of each stream.
        us: what a step of so many rows takes.
    """
    counts = [0] * len(chances)
    plain_us = us(len(chances))
    if not any(offered) or plain_us is None:
        return counts
    # A draft counts if all before it hold, so a stream's first is always its best.
    gains = sorted(
        (-(chance ** (place + 1)), place, stream)
        for stream, (chance, count) in enumerate(zip(chances, offered, strict=True))
        for place in range(count)
    )
    tokens = float(len(chances))
    best_rate, best_count = GAIN_MIN_RATIO * tokens / plain_us, 0
    for count, (minus_gain, _place, _stream) in enumerate(gains, 1):
        tokens -= minus_gain
        step_us = us(len(chances) + count)
        assert step_us is not None, "fewer rows are known"
        if tokens / step_us > best_rate:
            best_rate, best_count = tokens / step_us, count
    for _gain, _place, stream in gains[:best_count]:
        counts[stream] += 1
    return counts


@dataclass(slots=True)
class Drafting:
    """What one stream keeps from step to step."""

    drafter: Drafter
    chance: Chance = field(default_factory=Chance)
    offered: list[int] = field(default_factory=list)  # for the step under way


class Speculation:
    """One worker's, whose streams' drafts cost nothing to make."""

    def __init__(self, drafter: Callable[[], Drafter], draft_tokens_max: int) -> None:
        self._drafter = drafter
        self._draft_tokens_max = draft_tokens_max
        self._times = StepTimes()

    def begin(self) -> Drafting:
        return Drafting(self._drafter())

    def choose(
        self, texts: Sequence[tuple[Drafting, Sequence[int]]], limits: Sequence[int]
    ) -> list[list[int]]:
        """The drafts of the next step for each stream, at most ``limits`` tokens each."""
        if texts:
            self._offer(texts, [min(limit, self._draft_tokens_max) for limit in limits])
        counts = counts_that_pay(
            [drafting.chance.value for drafting, _ in texts],
            [len(drafting.offered) for drafting, _ in texts],
            self._times.estimate(),
        )
        return [
            drafting.offered[:count] for (drafting, _), count in zip(texts, counts, strict=True)
        ]

    def came(self, drafting: Drafting, tokens: Sequence[int]) -> None:
        """What a step generated, for the drafts that were offered, taken or not. At most the last
        of ``tokens`` is not its draft."""
        for token, draft in zip(tokens, drafting.offered, strict=False):
            drafting.chance.saw(held=token == draft)
        drafting.offered = []

    def took(self, rows: int, elapsed_us: int) -> None:
        """How long a step took that streams had to themselves."""
        self._times.measured(rows, elapsed_us)

    def _offer(
        self, texts: Sequence[tuple[Drafting, Sequence[int]]], limits: Sequence[int]
    ) -> None:
        for (drafting, tokens), limit in zip(texts, limits, strict=True):
            drafting.offered = drafting.drafter.draft(tokens, limit)
