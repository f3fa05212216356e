"""Logs in a *storm*, in which the same thing happens a thousand times a second.

What is the same (the same logger, level and text before its values are put in) is said
``STORM_LINES`` times in ``STORM_S`` seconds; the first line afterwards says how many were left out.
Audit lines have bounds of their own, and pass.
"""

import logging
from collections import OrderedDict

from pdserve.clock import Clock, S, monotonic

STORM_S = 10.0
STORM_LINES = 10

KINDS_MAX = 1_000
"""Kinds of lines that are counted; the one that was quiet for longest is forgotten first."""

NEVER_LEFT_OUT = ("pdserve.audit", "pdserve.kvstore.audit", "pdserve.why")


class StormFilter(logging.Filter):
    """Lets the first lines of a kind pass, and counts the others."""

    def __init__(self, *, clock: Clock = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, int, str], list[int]] = OrderedDict()
        """When the span began, lines in it, and how many were left out."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name in NEVER_LEFT_OUT:
            return True
        kind, now_ns = (record.name, record.levelno, str(record.msg)), self._clock()
        span = self._kinds.setdefault(kind, [now_ns, 0, 0])
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS_MAX:
            self._kinds.popitem(last=False)
        if now_ns - span[0] >= STORM_S * S:
            left_out = span[2]
            span[:] = [now_ns, 0, 0]
            if left_out:
                record.left_out = left_out
        span[1] += 1
        if span[1] > STORM_LINES:
            span[2] += 1
            return False
        return True


def told_of(record: logging.LogRecord) -> str:
    """To be put behind the record's message: what a storm has swallowed before it, if anything."""
    left_out = getattr(record, "left_out", 0)
    return f" ({left_out} like this were left out)" if left_out else ""


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return super().formatMessage(record) + told_of(record)


def log_to_stderr(level: int = logging.INFO) -> None:
    """For a process of its own that is no replica: lines with the time, and bounded in a storm."""
    handler = logging.StreamHandler()
    handler.addFilter(StormFilter())
    handler.setFormatter(_Formatter("%(asctime)s %(name)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
