"""How many tokens a tenant may have: budgets per minute and per day, prompt and answer together.

Windows are fixed: a minute of the clock, a day of UTC. So what is left can be told to a person
("until midnight"), and gateways can add up their counts by name alone. A tenant may spend one
window's budget at its end and the next one's at its beginning. What is spent is what was computed
or read from the cache, as it happens. A call that is under way when the budget ends runs to its own
end: beyond its budget a tenant gets at most what it had in flight.

    check ── is anything left? ──► the call runs ── spend, token by token ──► counts
                                                                               │ once a second
    what other gateways have counted ◄──────────── Redis, if one is named ◄────┘

``Ledger`` is pure: the time is an argument, and who talks to Redis asks it for what is new, and
tells it what the sum is. Without Redis, or while it cannot be reached, each gateway counts for
itself.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from pdserve.errors import RateLimited

TOKENS_MAX = 1 << 50

MINUTE_MS = 60_000


class Period(Enum):
    MINUTE = MINUTE_MS
    DAY = 24 * 60 * MINUTE_MS

    def window(self, now_ms: int) -> int:
        return now_ms // self.value

    def left_ms(self, now_ms: int) -> int:
        return self.value - now_ms % self.value


@dataclass(frozen=True, slots=True)
class Quota:
    """Of one tenant; None: no bound."""

    tokens_per_min: int | None = None
    tokens_per_day: int | None = None

    def bounds(self) -> Iterator[tuple[Period, int]]:
        if self.tokens_per_min is not None:
            yield Period.MINUTE, self.tokens_per_min
        if self.tokens_per_day is not None:
            yield Period.DAY, self.tokens_per_day


NO_QUOTA = Quota()


@dataclass(slots=True)
class _Count:
    """What a tenant has spent in one window."""

    window: int
    here: int = 0  # at this gateway, and told to the others
    untold: int = 0
    elsewhere: int = 0

    @property
    def spent(self) -> int:
        return self.here + self.untold + self.elsewhere


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be added to a sum that all gateways share."""

    tenant: str
    period: Period
    window: int
    tokens: int

    @property
    def name(self) -> str:
        """The period and the window first: a tenant may have any character in its name."""
        return f"{self.period.name.lower()}:{self.window}:{self.tenant}"


class Ledger:
    """One per gateway. It remembers tenants that have a quota, and nobody else."""

    def __init__(self, quotas: Mapping[str, Quota] | None = None) -> None:
        self._quotas: Mapping[str, Quota] = quotas or {}
        self._counts: dict[tuple[str, Period], _Count] = {}

    def set_quotas(self, quotas: Mapping[str, Quota]) -> None:
        """From now on; what was spent stays spent for those who still have a quota."""
        self._quotas = quotas
        self._counts = {
            (tenant, period): count
            for (tenant, period), count in self._counts.items()
            if any(period is bounded for bounded, _ in self._of(tenant).bounds())
        }

    def check(self, tenant: str, now_ms: int) -> None:
        """
        Raises:
            RateLimited: a window's tokens are spent; with the time until the next one.
        """
        for period, tokens_max in self._of(tenant).bounds():
            spent = self._count(tenant, period, now_ms).spent
            if spent >= tokens_max:
                left_ms = period.left_ms(now_ms)
                raise RateLimited(
                    f"The tenant {tenant} has had {spent} tokens this {period.name.lower()}, of "
                    f"{tokens_max} that its quota allows; come back in {-(-left_ms // 1000)} s, or "
                    "ask the operator of this cluster for more",
                    retry_after_ms=left_ms,
                )

    def spend(self, tenant: str, tokens: int, now_ms: int) -> None:
        for period, _ in self._of(tenant).bounds():
            self._count(tenant, period, now_ms).untold += tokens

    # ── with other gateways ──────────────────────────────────────────────────────────────────────

    def entries(self, now_ms: int) -> list[Entry]:
        """What the others do not know yet; with 0 tokens where only their sum is asked for."""
        return [
            Entry(tenant, period, count.window, count.untold)
            for (tenant, period), count in self._counts.items()
            if count.window == period.window(now_ms)
        ]

    def told(self, entries: Collection[Entry], sums: Mapping[str, int]) -> None:
        """The others know of ``entries`` now; ``sums``, by name, are what all have spent."""
        for entry in entries:
            count = self._counts.get((entry.tenant, entry.period))
            if count is None or count.window != entry.window:
                continue
            count.untold -= entry.tokens
            count.here += entry.tokens
            count.elsewhere = max(0, sums[entry.name] - count.here)

    def _of(self, tenant: str) -> Quota:
        return self._quotas.get(tenant, NO_QUOTA)

    def _count(self, tenant: str, period: Period, now_ms: int) -> _Count:
        window = period.window(now_ms)
        count = self._counts.get((tenant, period))
        if count is None or count.window != window:
            count = self._counts[tenant, period] = _Count(window)
        return count
