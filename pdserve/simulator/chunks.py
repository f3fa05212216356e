"""How many tokens of a prompt each step takes, all steps at once.

Chunks of equal size, or of equal work: where streams wait for a step, a live worker takes the fewer
tokens the more stand before them, since each attends to all of those
(``prefill.batch.equal_work_tokens``, which rounds to whole blocks). With D tokens before it a token
is twice the work of the first, so up to a position p it is

    W(p) = p + p²/(2·D)            and k chunks of size m from p on end at   W⁻¹(W(p) + k·m)
"""

import math

_ALMOST = 1e-9  # of a step: what rounding may add to a whole number of them


class Chunks:
    """Positions count from a prompt's beginning, cached tokens included."""

    __slots__ = ("_double_cost", "size_tokens")

    def __init__(self, size_tokens: int, double_cost_tokens: int | None = None) -> None:
        """``size_tokens``: of a prompt's first chunk. ``double_cost_tokens``: D; None: all chunks
        are equally large."""
        self.size_tokens = size_tokens
        self._double_cost = double_cost_tokens

    def after(self, position: int, steps: int) -> int:
        """Where so many steps from there on end, however long the prompt is; each step takes at
        least one token."""
        if self._double_cost is None:
            return position + steps * self.size_tokens
        equal = min(steps, self._equal_steps(position))
        if equal:
            work = self._work(position) + equal * self.size_tokens
            end = self._double_cost * (math.sqrt(1 + 2 * work / self._double_cost) - 1)
            position = math.floor(end + 0.5)
        return position + steps - equal

    def steps(self, position: int, end: int) -> int:
        """The fewest steps from there that reach ``end``."""
        if end <= position:
            return 0
        if self._double_cost is None:
            return -(-(end - position) // self.size_tokens)  # ceil
        equal = self._equal_steps(position)
        border = min(end, self.after(position, equal))
        work = self._work(border) - self._work(position)
        steps = max(1, math.ceil(work / self.size_tokens - _ALMOST) + end - border)
        while steps > 1 and self.after(position, steps - 1) >= end:
            steps -= 1
        while self.after(position, steps) < end:
            steps += 1
        return steps

    def _equal_steps(self, position: int) -> int:
        """How many steps from there on take a token or more of equal work. Later ones take one."""
        assert self._double_cost is not None
        last = self._double_cost * (self.size_tokens - 1)
        if position >= last:
            return 0
        return int((self._work(last) - self._work(position)) / self.size_tokens)

    def _work(self, position: int) -> float:
        assert self._double_cost is not None
        return position + position * position / (2 * self._double_cost)
