"""Whether a tier is to be used at this moment. Pure: no clock of its own.

Failures in a row put it out of use for a while, each time for longer; then it is tried again, and
the first success makes all good. So what is broken for good costs one attempt now and then, and
what was broken for a moment is back soon.
"""

PAUSE_S_MIN = 5.0
PAUSE_S_MAX = 300.0


class Health:
    def __init__(self, failures_max: int) -> None:
        """``failures_max`` in a row put it out of use."""
        assert failures_max > 0
        self._failures_max = failures_max
        self._failures = 0
        self._until_s = 0.0

    def is_usable(self, now_s: float) -> bool:
        return now_s >= self._until_s

    def failed(self, now_s: float) -> float | None:
        """For how many seconds it is out of use now; None when it is not."""
        self._failures += 1
        beyond = self._failures - self._failures_max
        if beyond < 0:
            return None
        pause_s = min(PAUSE_S_MAX, PAUSE_S_MIN * 2.0 ** min(beyond, 16))
        self._until_s = now_s + pause_s
        return pause_s

    def succeeded(self) -> None:
        self._failures = 0
