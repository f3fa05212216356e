"""Time, in integer nanoseconds. Instants are ``now_ns``, durations ``elapsed_ns``.

``monotonic`` orders events inside one host and never goes back; no two hosts agree on it. What
crosses hosts (a deadline) travels as ``steady_unix_ms``: wall time that nobody sets any more once a
process has begun. A wall clock that jumps by an hour moves no deadline.
"""

import time
from collections.abc import Callable
from typing import Final

# Final: compiled code (``pdserve compile``) has the number in the place of a look-up by name.
US: Final = 1_000
MS: Final = 1_000_000
S: Final = 1_000_000_000

Clock = Callable[[], int]

monotonic: Clock = time.monotonic_ns


_UNIX_ZERO_NS = time.time_ns() - time.monotonic_ns()


def unix_ms() -> int:
    """The wall clock as it is set now: for what people and other systems have written."""
    return time.time_ns() // MS


def steady_unix_ms() -> int:
    """The wall clock as it was set when this process began, and moved on by ``monotonic``: for
    deadlines between processes."""
    return (_UNIX_ZERO_NS + time.monotonic_ns()) // MS


def until_ns(deadline_unix_ms: int, *, now_unix_ms: int, now_ns: int) -> int:
    """The monotonic instant at which a deadline given in wall time passes."""
    return now_ns + (deadline_unix_ms - now_unix_ms) * MS
