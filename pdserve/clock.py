"""Time, in integer nanoseconds. Instants are ``now_ns``, durations ``elapsed_ns``.

``monotonic`` orders events inside one host and never goes back; no two hosts agree on it. What
crosses hosts (a deadline) travels as wall time in ``unix_ms``, and is turned into a monotonic
instant once, on arrival.
"""

import time
from collections.abc import Callable

US = 1_000
MS = 1_000_000
S = 1_000_000_000

Clock = Callable[[], int]

monotonic: Clock = time.monotonic_ns


def unix_ms() -> int:
    return time.time_ns() // MS


def until_ns(deadline_unix_ms: int, *, now_unix_ms: int, now_ns: int) -> int:
    """The monotonic instant at which a deadline given in wall time passes."""
    return now_ns + (deadline_unix_ms - now_unix_ms) * MS
