"""Fair shares of tenants: start-time tags, charged as work is dispatched.

Every tenant has a tag ``F``: the time up to which it has used its share. Dispatching work of cost
``c`` moves it on:

    F ← max(F, arrival of the request) + c / (share · workers)

A tenant's next request counts as having arrived at ``max(arrival, F)``. Who asks for less than its
share has its tag in the past and is not touched; who floods the pool finds its own requests dated
further and further into the future, behind those of the others. A share is a tenant's weight over
the weights of all that wait or ran lately, so a tenant that is alone has all of it.

Within a tenant the tag is the same for all, so tags never disturb its own order.

Between tenants a short request of the one may go before a long one of the other that came many
minutes earlier, and a flood of short ones would have to run that far ahead before it gives way. So
a tenant whose tag is more than ``AHEAD_MAX_NS`` ahead of *now* comes after all those who are not.

Source: start-time fair queueing (Goyal et al., 1996), applied to worker time; the service gap
between two backlogged tenants is that of VTC (arXiv:2401.00588) plus the difference of two boosts.
"""

from collections.abc import Collection, Mapping
from typing import Final

from pdserve.clock import S
from pdserve.router.entry import Entry

TAGS_MAX: Final = 64
"""With more tags than this, those in the past are forgotten: they have no effect."""


AHEAD_MAX_NS: Final = 2 * S
"""By how much a tenant may be ahead of its share and still compete by key."""

BEYOND_NS: Final = 1 << 60
"""Later than any arrival."""


class FairTags:
    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._tags_ns: dict[str, int] = {}
        self._workers = 1

    def set_workers(self, count: int) -> None:
        self._workers = max(1, count)

    def tag_ns(self, tenant: str, now_ns: int) -> int:
        """Its next request counts as having arrived then, at the earliest."""
        tag_ns = self._tags_ns.get(tenant, 0)
        return tag_ns + (BEYOND_NS if tag_ns - now_ns > AHEAD_MAX_NS else 0)

    def charge(self, entry: Entry, active: Collection[str], now_ns: int) -> None:
        """``entry`` is dispatched while the tenants ``active`` wait."""
        tenant = entry.request.tenant
        tags_ns = self._tags_ns
        # A tag runs from now at the earliest: a share that was not used is gone.
        used_to_ns = max(tags_ns.get(tenant, 0), entry.arrived_ns)
        rate = self._share(tenant, active, now_ns) * self._workers
        tags_ns[tenant] = used_to_ns + round(entry.work_ns / rate)
        if len(tags_ns) > TAGS_MAX:
            self._tags_ns = {t: tag_ns for t, tag_ns in tags_ns.items() if tag_ns > now_ns}

    def _share(self, tenant: str, active: Collection[str], now_ns: int) -> float:
        """What is due to it beside those who wait and those who had more than their share."""
        if len(active) == len(self._tags_ns) == 1 and tenant in active and tenant in self._tags_ns:
            return 1.0  # it has always been alone
        others = {t for t, tag_ns in self._tags_ns.items() if tag_ns > now_ns}
        others.update(active)
        others.discard(tenant)
        if not others:
            return 1.0
        weight = self._weight(tenant)
        return weight / (weight + sum(map(self._weight, others)))

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)
