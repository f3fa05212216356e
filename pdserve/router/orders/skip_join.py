"""Boosted skip-join: levels on the prefill time that is left, fair between tenants, with rescue.

Every tenant has the levels of ``levels``. Within a tenant the next is the least of its levels'
heads by ``arrival − boost(level)``; between tenants the heads are compared with the arrival put
back to the tenant's tag (``tenants``). So a pick looks at a few heads, whatever the queue's length.
A service class counts as an earlier or later arrival, by a fixed time.

An entry's level follows its work. It rises as chunks are computed; it falls when its work turns out
larger than its level's quantum, or when it took more than a quantum and is not done: then it is
*demoted*, and does not rise above that level again.

``fcfs`` is the same with one level, where nobody ever yields.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.levels import Ladder
from pdserve.router.orders.rescue import Rescue
from pdserve.router.orders.tenant_levels import Item, TenantLevels
from pdserve.router.orders.tenants import FairTags
from pdserve.router_config import RouterConfig

CLASS_DELAYS_NS: Mapping[ServiceClass, int] = {
    ServiceClass.INTERACTIVE: -2 * S,
    ServiceClass.STANDARD: 0,
    ServiceClass.BATCH: 30 * S,
}
"""By how much a class counts as having arrived earlier or later."""


@dataclass(slots=True)
class _Standing:
    """What an order remembers of an entry from its first push until it is forgotten."""

    floor_level: int = 0  # it was demoted: no level above this one any more
    served_us: int = 0  # compute time it got since it is in its level
    tag_ns: int = 0  # its tenant's, when it was dispatched: its own cost must not count against it


class SkipJoin:
    def __init__(self, settings: RouterConfig, gamma_per_s: float, counters: Counter[str]) -> None:
        self._settings = settings
        self._counters = counters
        self._gamma_per_s = gamma_per_s
        self.ladder = Ladder.of(settings, gamma_per_s)
        self.preempts = settings.policy != "fcfs"
        self._tenants: dict[str, TenantLevels] = {}  # that have somebody waiting
        self._spare: TenantLevels | None = None  # of one that has nobody any more
        self._standings: dict[RequestId, _Standing] = {}
        self._waiting: dict[RequestId, Entry] = {}
        self._tags = FairTags(settings.tenant_weights)
        self._rescue = Rescue(
            after_ns=round(settings.rescue_after_ms * MS),
            ratio=settings.rescue_ratio,
            share=settings.rescue_share,
        )
        self._rescued: dict[RequestId, None] = {}  # running because of their claim
        self._longest_ns = 0  # of all prefills so far: the piece that may be running
        self._work_ns = [0] * len(self.ladder.quanta_ns)  # that waits, by level
        self._counted_ns: dict[RequestId, int] = {}

    # ── settings that move ───────────────────────────────────────────────────────────────────────

    def set_gamma(self, gamma_per_s: float) -> None:
        """Levels keep their order; only their heads' keys change."""
        if gamma_per_s == self._gamma_per_s:
            return
        self._gamma_per_s = gamma_per_s
        self.ladder = Ladder.of(self._settings, gamma_per_s)
        for tenant in self._tenants.values():
            tenant.set_boosts(self.ladder.boosts_ns)

    def set_workers(self, count: int) -> None:
        self._tags.set_workers(count)
        self._rescue.set_workers(count)

    # ── Order ────────────────────────────────────────────────────────────────────────────────────

    def push(self, entry: Entry, now_ns: int) -> None:
        standing = self._standings.get(entry.id)
        if standing is None:
            standing = self._standings[entry.id] = _Standing()
            entry.level = self.ladder.level_of(entry.work_ns)
            if entry.level > 0:
                self._counters["skips"] += 1
        else:
            entry.level = max(standing.floor_level, self.ladder.level_of(entry.work_ns))
        standing.served_us = 0
        entry.virtual_ns = entry.arrived_ns + CLASS_DELAYS_NS[entry.request.service_class]
        self._rescued.pop(entry.id, None)
        self._waiting[entry.id] = entry
        self._enter(entry)
        if self.preempts:
            self._rescue.add(entry)

    def remove(self, entry: Entry) -> None:
        del self._waiting[entry.id]
        self._exit(entry)
        if self.preempts:
            self._rescue.remove(entry.id)

    def refresh(self, entry: Entry, now_ns: int) -> None:
        standing = self._standings[entry.id]
        level = max(standing.floor_level, self.ladder.level_of(entry.work_ns))
        if level == entry.level:
            return
        self._exit(entry)
        if level > entry.level:
            self._demote(entry, standing, level)
        else:
            entry.level = level
        self._enter(entry)

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        self._check_bound(entry, now_ns)
        if self.rescued(now_ns) is entry and self._first(now_ns) is not entry:
            self._rescue.pay(entry)
            self._rescued[entry.id] = None
            self._counters["rescues"] += 1
        self._standings[entry.id].tag_ns = self._tags.tag_ns(entry.request.tenant, now_ns)
        self._tags.charge(entry, self._tenants, now_ns)

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        standing = self._standings[entry.id]
        standing.served_us += elapsed_us
        level = max(standing.floor_level, self.ladder.level_of(entry.work_ns))
        overdrawn = standing.served_us * 1000 > self.ladder.quanta_ns[entry.level]
        if level > entry.level:
            self._demote(entry, standing, level)
        elif overdrawn and entry.level < self.ladder.last:
            self._demote(entry, standing, entry.level + 1)
        elif level < entry.level:
            entry.level, standing.served_us = level, 0
            self._counters["promotions"] += 1

    def forget(self, entry: Entry) -> None:
        self._standings.pop(entry.id, None)
        self._rescued.pop(entry.id, None)

    def may_stand_aside(self, entry: Entry) -> bool:
        """Keys are static; but a claim has its place behind those that came before."""
        return self._rescue.bound_ns(entry.id) is None

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        first = self.head(now_ns)
        if first is None:
            return
        yield first
        tenants = self._tenants
        if len(tenants) == 1:
            items = iter(next(iter(tenants.values())))
        else:
            items = heapq.merge(*(self._keyed(name, now_ns) for name in tenants))
        for _, _, entry in items:
            if entry is not first:
                yield entry

    def key_ns(self, entry: Entry, now_ns: int) -> int:
        """Its key if it waited now with what is left of it."""
        if len(self._tenants) > 1:
            return self._fair_key_ns(entry, now_ns)
        return self._own_key_ns(entry)

    @property
    def key_basis(self) -> object:
        return self._gamma_per_s, len(self._tenants) > 1

    def _fair_key_ns(self, entry: Entry, now_ns: int) -> int:
        """Beside other tenants'. Who runs has the tag with which it was chosen."""
        waits = entry.id in self._waiting
        standing = self._standings[entry.id]
        tag_ns = self._tags.tag_ns(entry.request.tenant, now_ns) if waits else standing.tag_ns
        return self._own_key_ns(entry, tag_ns)

    def _own_key_ns(self, entry: Entry, tag_ns: int = 0) -> int:
        """Among its tenant's. It falls as its work shrinks, and its level with it."""
        return max(entry.virtual_ns, tag_ns) - self.ladder.boosts_ns[entry.level]

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        if running.id in self._rescued:
            return False
        if waiting.request.tenant == running.request.tenant:
            gain_ns = self._own_key_ns(running) - self._own_key_ns(waiting)
        else:
            gain_ns = self._fair_key_ns(running, now_ns) - self._fair_key_ns(waiting, now_ns)
        return gain_ns > margin_ns

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._waiting

    def lengths(self) -> tuple[int, ...]:
        counts = [0] * len(self.ladder.quanta_ns)
        for tenant in self._tenants.values():
            for index, count in enumerate(tenant.lengths()):
                counts[index] += count
        return tuple(counts)

    # ── beyond Order ─────────────────────────────────────────────────────────────────────────────

    def head(self, now_ns: int) -> Entry | None:
        """The next one, looking at one head per tenant."""
        return self.rescued(now_ns) or self._first(now_ns)

    def _first(self, now_ns: int) -> Entry | None:
        if not self._waiting:
            return None
        boosts_ns = self.ladder.boosts_ns
        tenants = self._tenants
        if len(tenants) == 1:
            (tenant,) = tenants.values()
            return tenant.head
        best: Entry | None = None
        best_key: tuple[int, int] | None = None
        for name, tenant in tenants.items():
            entry = tenant.head
            assert entry is not None
            virtual_ns = max(entry.virtual_ns, self._tags.tag_ns(name, now_ns))
            key = (virtual_ns - boosts_ns[entry.level], entry.order)
            if best_key is None or key < best_key:
                best, best_key = entry, key
        return best

    def rescued(self, now_ns: int) -> Entry | None:
        """Whom a claim puts before everybody else now."""
        return self._rescue.head(now_ns) if self.preempts else None

    def work_before_ns(self, work_ns: int) -> int:
        """What waits in the levels that so much work would not pass."""
        return sum(self._work_ns[: self.ladder.level_of(work_ns) + 1])

    def _check_bound(self, entry: Entry, now_ns: int) -> None:
        """Count whether the promise of ``rescue`` was kept."""
        self._longest_ns = max(self._longest_ns, entry.work_ns)
        bound_ns = self._rescue.bound_ns(entry.id)
        if bound_ns is not None:
            self._counters["bounds_due"] += 1
            if now_ns > bound_ns + self._longest_ns:
                self._counters["bounds_broken"] += 1

    def bound_ns(self, entry: Entry) -> int | None:
        """When a claim that is due is served at the latest, but for what runs at that moment."""
        return self._rescue.bound_ns(entry.id)

    # ── levels ───────────────────────────────────────────────────────────────────────────────────

    def _enter(self, entry: Entry) -> None:
        name = entry.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = self._empty_levels()
        tenant.push(entry, entry.virtual_ns)
        self._counted_ns[entry.id] = entry.work_ns
        self._work_ns[entry.level] += entry.work_ns

    def _exit(self, entry: Entry) -> None:
        name = entry.request.tenant
        tenant = self._tenants[name]
        tenant.remove(entry)
        self._work_ns[entry.level] -= self._counted_ns.pop(entry.id)
        if not tenant:
            self._spare = self._tenants.pop(name)

    def _empty_levels(self) -> TenantLevels:
        """Where workers keep up, a tenant has somebody waiting, and nobody, many times a second."""
        tenant, self._spare = self._spare, None
        if tenant is None:
            return TenantLevels(self.ladder.boosts_ns)
        tenant.set_boosts(self.ladder.boosts_ns)
        return tenant

    def _demote(self, entry: Entry, standing: _Standing, level: int) -> None:
        assert level > entry.level
        entry.level = standing.floor_level = level
        standing.served_us = 0
        self._counters["demotions"] += 1

    def _keyed(self, name: str, now_ns: int) -> Iterator[Item]:
        """A tenant's entries in its own order, with the keys that stand beside other tenants'."""
        tag_ns = self._tags.tag_ns(name, now_ns)
        for _, order, entry in self._tenants[name]:
            yield self.ladder.key_ns(max(entry.virtual_ns, tag_ns), entry.level), order, entry

    def check(self) -> None:
        assert sum(self.lengths()) == len(self._waiting)
        assert set(self._waiting) <= set(self._standings)
        for name, tenant in self._tenants.items():
            tenant.check()
            assert len(tenant) > 0
            for *_, entry in tenant:
                assert entry.request.tenant == name
                assert self._waiting[entry.id] is entry
                self.check_level(entry)
        assert not self._spare

    def check_level(self, entry: Entry) -> None:
        """Of one that waits or runs: the key is computed from it."""
        floor_level = self._standings[entry.id].floor_level
        assert entry.level == max(floor_level, self.ladder.level_of(entry.work_ns))
