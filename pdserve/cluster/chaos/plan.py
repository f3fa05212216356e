"""What happens when, drawn from a seed. Pure: no process is looked at.

A strike names a role and a number, not a process: which one that is, is the number's remainder by
how many there are at that moment. So one seed is one plan for clusters of every size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.errors import ConfigError

ROLES = ("prefill", "decode", "router", "store")
"""Whose end no client may notice. A gateway's clients lose their connections with it."""

KINDS = {
    "kill": "SIGKILL to a worker, the router or a store node",
    "stop": "SIGSTOP to one of them, and SIGCONT after up to stop_s_max seconds",
    "corrupt": "one bit of one stored KV block is flipped where it lies in shared memory",
    "shm": "shared memory is filled up for a few seconds, but for a reserve",
    "disk": "the store's disk is kept busy with writes for a few seconds",
}
DEFAULT_KINDS = ("kill", "stop")
"""The others take memory or a disk that somebody else may need; and a process that has verified a
block once does not verify it again, so after ``corrupt`` a wrong token is possible and no bug."""

SETTLE_S = 2.0
"""At the beginning and the end of a run, without strikes."""

GAP_S = 6.0
"""Between two strikes on average: a worker's successor needs about as long, and the promise is for
clusters in which every role has somebody."""

STOP_S_MAX = 5.0
SPAN_S = (0.5, 3.0)


@dataclass(frozen=True, slots=True)
class Strike:
    at_s: float  # after the beginning
    kind: str
    role: str  # "" where none is meant
    number: int
    span_s: float  # of what ends by itself

    def __str__(self) -> str:
        whom = f" {self.role}" if self.role else ""
        how_long = f" for {self.span_s:.1f} s" if self.kind not in ("kill", "corrupt") else ""
        return f"{self.at_s:6.1f} s  {self.kind}{whom}{how_long}"


def drawn(seed: int, *, seconds: float, kinds: Sequence[str]) -> tuple[Strike, ...]:
    """At least one strike, in order of time.

    Raises:
        ConfigError: a kind that there is not, or too little time for a strike.
    """
    for kind in kinds:
        if kind == "clock":
            raise ConfigError(
                "faults: the clock of another process cannot be moved without the rights to move "
                "this machine's; `python -m tests.simulation` moves them"
            )
        if kind == "partition":
            raise ConfigError(
                "faults: cutting a network takes rights on the hosts' network; "
                "`python -m tests.simulation` cuts it"
            )
        if kind not in KINDS:
            raise ConfigError(f"faults: {kind!r} is none of {', '.join(KINDS)}")
    if not kinds:
        raise ConfigError(f"faults: name at least one of {', '.join(KINDS)}")
    if seconds <= 2 * SETTLE_S:
        raise ConfigError(f"seconds is {seconds}, must be more than {2 * SETTLE_S}")
    dice = random.Random(seed)
    count = max(1, round((seconds - 2 * SETTLE_S) / GAP_S))
    strikes = []
    for _ in range(count):
        kind = dice.choice(list(kinds))
        has_role = kind in ("kill", "stop")
        strikes.append(
            Strike(
                at_s=round(dice.uniform(SETTLE_S, seconds - SETTLE_S), 2),
                kind=kind,
                role=dice.choice(ROLES) if has_role else "",
                number=dice.randrange(1 << 16),
                span_s=round(
                    dice.uniform(0.1, STOP_S_MAX) if kind == "stop" else dice.uniform(*SPAN_S), 2
                ),
            )
        )
    return tuple(sorted(strikes, key=lambda strike: strike.at_s))
