"""Time, in integer nanoseconds. Instants are ``now_ns``, durations ``elapsed_ns``.

``monotonic`` orders events inside one host and never goes back; no two hosts agree on it. A
deadline is held as ``SteadyMs``: wall time that nobody sets any more once a process has begun. Two
processes need not agree on that either: between their starts the clock may have been set, and hosts
differ. So what is sent of it is the time that is left (``wire.codec``), and a wall clock that jumps
by an hour moves no deadline.
"""

import time
from collections.abc import Callable
from typing import Annotated, Final

# Final: compiled code (``pdserve compile``) has the number in the place of a look-up by name.
US: Final = 1_000
MS: Final = 1_000_000
S: Final = 1_000_000_000

Clock = Callable[[], int]

SteadyMs = Annotated[int, "steady_unix_ms"]
"""An instant by ``steady_unix_ms`` of the process that holds it; 0: never."""

SinceUs = Annotated[int, "steady_unix_us"]
"""An instant in the past by ``steady_unix_us`` of the process that holds it; 0: none. What is sent
of it is how long ago it was, for the same reason."""

monotonic: Clock = time.monotonic_ns


_UNIX_ZERO_NS = time.time_ns() - time.monotonic_ns()


def unix_ms() -> int:
    """The wall clock as it is set now: for what people and other systems have written."""
    return time.time_ns() // MS


def steady_unix_ms() -> int:
    """The wall clock as it was set when this process began, and moved on by ``monotonic``: for
    deadlines. Another process may read an hour more."""
    return (_UNIX_ZERO_NS + time.monotonic_ns()) // MS


def steady_unix_us() -> int:
    """Likewise, for durations that begin in one process and end in another."""
    return (_UNIX_ZERO_NS + time.monotonic_ns()) // US


def until_ns(deadline_unix_ms: int, *, now_unix_ms: int, now_ns: int) -> int:
    """The monotonic instant at which a deadline given in wall time passes."""
    return now_ns + (deadline_unix_ms - now_unix_ms) * MS
