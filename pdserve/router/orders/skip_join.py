"""Boosted skip-join: levels on the prefill time that is left, fair between tenants, with rescue.

Every tenant has the levels of ``levels``. Within a tenant the next is the least of its rungs' heads
by ``arrival − boost(rung)``; between tenants the heads are compared with the arrival put
back to the tenant's tag (``tenants``). So a pick looks at a few heads, whatever the queue's length.
A service class counts as an earlier or later arrival, by a fixed time.

An entry's rung follows its work. It rises as chunks are computed; it falls when its work turns out
larger than its rung's quantum, or when it took more than a quantum and is not done: then it is
*demoted*, and does not rise above that rung again.

``fcfs`` is the same with one level, where nobody ever yields.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from pdserve.clock import MS, S
from pdserve.ids import RequestId
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.levels import Ladder, level_of
from pdserve.router.orders.base import Order
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

PREEMPT_RATIO: Final = 4.0
"""How much shorter one must be to preempt. What that gains over what it costs is about this ratio,
before the way through the store: near 1 a preemption is worth next to nothing."""

TAIL_PREEMPT_RATIO: Final = 32.0
"""With the goal ``tail``. What long prefills lose to much shorter ones is little, and most of what
there is to gain; the rest is paid for by the 99th percentile, and shadows do not see it."""


class _Standing:
    """What an order remembers of an entry from its first push until it is forgotten."""

    __slots__ = ("counted_ns", "floor_rung", "rescued", "served_us", "tag_ns", "waits")

    def __init__(self) -> None:
        self.waits = False
        self.rescued = False  # it runs because of its claim
        self.floor_rung = 0  # it was demoted: none above this one any more
        self.served_us = 0  # compute time it got since it is on its rung
        self.tag_ns = 0  # its tenant's, when dispatched: its own cost must not count against it
        self.counted_ns = 0  # its work, as its rung counts it while it waits


class SkipJoin(Order):
    def __init__(self, settings: RouterConfig, gamma_per_s: float, counters: Counter[str]) -> None:
        self._settings = settings
        self._counters = counters
        self._gamma_per_s = gamma_per_s
        self.ladder = Ladder.of(settings, gamma_per_s)
        self.preempts = settings.policy != "fcfs"
        is_tail = settings.goal == "tail" and settings.gamma_per_s is None
        usual_ratio = TAIL_PREEMPT_RATIO if is_tail else PREEMPT_RATIO
        self._preempt_ratio = settings.preempt_ratio or usual_ratio
        self._tenants: dict[str, TenantLevels] = {}  # that have somebody waiting
        self._spare: TenantLevels | None = None  # of one that has nobody any more
        self._standings: dict[RequestId, _Standing] = {}
        self._waiting_count = 0
        self._note_basis()
        self._tags = FairTags(settings.tenant_weights)
        self._rescue = Rescue(
            after_ns=round(settings.rescue_after_ms * MS),
            ratio=settings.rescue_ratio,
            share=settings.rescue_share,
        )
        self._longest_ns = 0  # of all prefills so far: the piece that may be running
        self._work_ns = [0] * len(self.ladder.quanta_ns)  # that waits, by rung

    # ── settings that move ───────────────────────────────────────────────────────────────────────

    def set_gamma(self, gamma_per_s: float) -> None:
        """Rungs keep their order; only their heads' keys change."""
        if gamma_per_s == self._gamma_per_s:
            return
        self._gamma_per_s = gamma_per_s
        self.ladder = Ladder.of(self._settings, gamma_per_s)
        for tenant in self._tenants.values():
            tenant.set_boosts(self.ladder.boosts_ns)
        self._note_basis()

    def set_workers(self, count: int) -> None:
        self._tags.set_workers(count)
        self._rescue.set_workers(count)

    # ── Order ────────────────────────────────────────────────────────────────────────────────────

    def push(self, entry: Entry, now_ns: int) -> None:
        standing = self._standings.get(entry.id)
        if standing is None:
            standing = self._standings[entry.id] = _Standing()
            _stand(entry, self._rung_of(entry, standing))
            if entry.level > 0:
                self._counters["skips"] += 1
        else:
            _stand(entry, self._rung_of(entry, standing))
        standing.served_us = 0
        entry.virtual_ns = entry.arrived_ns + CLASS_DELAYS_NS[entry.request.service_class]
        standing.rescued, standing.waits = False, True
        self._waiting_count += 1
        self._enter(entry, standing)
        if self.preempts:
            self._rescue.add(entry)

    def remove(self, entry: Entry) -> None:
        standing = self._standings[entry.id]
        if not standing.waits:
            raise KeyError(entry.id)
        standing.waits = False
        self._waiting_count -= 1
        self._exit(entry, standing)
        if self.preempts:
            self._rescue.remove(entry.id)

    def refresh(self, entry: Entry, now_ns: int) -> None:
        standing = self._standings[entry.id]
        rung = self._rung_of(entry, standing)
        if rung == entry.rung:
            return
        self._exit(entry, standing)
        if rung > entry.rung:
            self._demote(entry, standing, rung)
        else:
            _stand(entry, rung)
        self._enter(entry, standing)

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        standing = self._standings[entry.id]
        self._check_bound(entry, now_ns)
        if self.rescued(now_ns) is entry and self._first(now_ns) is not entry:
            self._rescue.pay(entry)
            standing.rescued = True
            self._counters["rescues"] += 1
        standing.tag_ns = self._tags.tag_ns(entry.request.tenant, now_ns)
        self._tags.charge(entry, self._tenants, now_ns)

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        standing = self._standings[entry.id]
        standing.served_us += elapsed_us
        rung = self._rung_of(entry, standing)
        overdrawn = standing.served_us * 1000 > self.ladder.quanta_ns[entry.rung]
        if rung > entry.rung:
            self._demote(entry, standing, rung)
        elif overdrawn and entry.rung < self.ladder.last:
            self._demote(entry, standing, entry.rung + 1)
        elif rung < entry.rung:
            if level_of(rung) < entry.level:
                self._counters["promotions"] += 1
            _stand(entry, rung)
            standing.served_us = 0

    def forget(self, entry: Entry) -> None:
        self._standings.pop(entry.id, None)

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

    def _fair_key_ns(self, entry: Entry, now_ns: int) -> int:
        """Beside other tenants'. Who runs has the tag with which it was chosen."""
        standing = self._standings[entry.id]
        tag_ns = standing.tag_ns
        if standing.waits:
            tag_ns = self._tags.tag_ns(entry.request.tenant, now_ns)
        return self._own_key_ns(entry, tag_ns)

    def _own_key_ns(self, entry: Entry, tag_ns: int = 0) -> int:
        """Among its tenant's. It falls as its work shrinks, and its rung with it."""
        return max(entry.virtual_ns, tag_ns) - self.ladder.boosts_ns[entry.rung]

    def kept_share(self, running: Entry, now_ns: int) -> float:
        """Who waited would have a claim by now, to as much of the pool's time; who has begun has no
        claim, and others that come for ever would leave it nothing."""
        return self._rescue.share if self._rescue.due_ns(running) <= now_ns else 0.0

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        standing = self._standings.get(running.id)
        if standing is not None and standing.rescued:
            return False
        if not running.begun and self.preempts and self._rescue.due_ns(running) <= now_ns:
            return False  # its turn came, and being taken back unbegun would be none
        if waiting.work_ns * self._preempt_ratio > running.work_ns:
            return False
        if waiting.request.tenant == running.request.tenant:
            gain_ns = self._own_key_ns(running) - self._own_key_ns(waiting)
        else:
            gain_ns = self._fair_key_ns(running, now_ns) - self._fair_key_ns(waiting, now_ns)
        return gain_ns > margin_ns

    def __len__(self) -> int:
        return self._waiting_count

    def __contains__(self, request: RequestId) -> bool:
        standing = self._standings.get(request)
        return standing is not None and standing.waits

    def lengths(self) -> tuple[int, ...]:
        """By level."""
        counts = [0] * (level_of(self.ladder.last) + 1)
        for tenant in self._tenants.values():
            for rung, count in tenant.lengths():
                counts[level_of(rung)] += count
        return tuple(counts)

    # ── beyond Order ─────────────────────────────────────────────────────────────────────────────

    def head(self, now_ns: int) -> Entry | None:
        """The next one, looking at one head per tenant."""
        return self.rescued(now_ns) or self._first(now_ns)

    def _first(self, now_ns: int) -> Entry | None:
        if not self._waiting_count:
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
            key = (virtual_ns - boosts_ns[entry.rung], entry.order)
            if best_key is None or key < best_key:
                best, best_key = entry, key
        return best

    def rescued(self, now_ns: int) -> Entry | None:
        """Whom a claim puts before everybody else now."""
        return self._rescue.head(now_ns) if self.preempts else None

    def work_before_ns(self, work_ns: int) -> int:
        """What waits on the rungs that so much work would not pass."""
        return sum(self._work_ns[: self.ladder.rung_of(work_ns) + 1])

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

    def _enter(self, entry: Entry, standing: _Standing) -> None:
        name = entry.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = self._empty_levels()
            self._note_basis()
        tenant.push(entry, entry.virtual_ns)
        standing.counted_ns = entry.work_ns
        self._work_ns[entry.rung] += entry.work_ns

    def _exit(self, entry: Entry, standing: _Standing) -> None:
        name = entry.request.tenant
        tenant = self._tenants[name]
        tenant.remove(entry)
        self._work_ns[entry.rung] -= standing.counted_ns
        if not tenant:
            self._spare = self._tenants.pop(name)
            self._note_basis()

    def _note_basis(self) -> None:
        """Keys are by γ, and by tags too where there are several tenants."""
        self.key_basis = self._gamma_per_s, len(self._tenants) > 1

    def _empty_levels(self) -> TenantLevels:
        """Where workers keep up, a tenant has somebody waiting, and nobody, many times a second."""
        tenant, self._spare = self._spare, None
        if tenant is None:
            return TenantLevels(self.ladder.boosts_ns)
        tenant.set_boosts(self.ladder.boosts_ns)
        return tenant

    def _rung_of(self, entry: Entry, standing: _Standing) -> int:
        """Where what is left of it belongs, but no higher than it was demoted to."""
        return max(standing.floor_rung, self.ladder.rung_of(entry.work_ns))

    def _demote(self, entry: Entry, standing: _Standing, rung: int) -> None:
        assert rung > entry.rung
        if level_of(rung) > entry.level:
            self._counters["demotions"] += 1
        _stand(entry, rung)
        standing.floor_rung = rung
        standing.served_us = 0

    def _keyed(self, name: str, now_ns: int) -> Iterator[Item]:
        """A tenant's entries in its own order, with the keys that stand beside other tenants'."""
        tag_ns = self._tags.tag_ns(name, now_ns)
        for _, order, entry in self._tenants[name]:
            yield self.ladder.key_ns(max(entry.virtual_ns, tag_ns), entry.rung), order, entry

    def check(self) -> None:
        assert sum(self.lengths()) == self._waiting_count
        assert self._waiting_count == sum(one.waits for one in self._standings.values())
        for name, tenant in self._tenants.items():
            tenant.check()
            assert len(tenant) > 0
            for *_, entry in tenant:
                assert entry.request.tenant == name
                assert self._standings[entry.id].waits
                self.check_level(entry)
        assert not self._spare

    def check_level(self, entry: Entry) -> None:
        """Of one that waits or runs: the key is computed from it."""
        assert entry.rung == self._rung_of(entry, self._standings[entry.id])
        assert entry.level == level_of(entry.rung)


def _stand(entry: Entry, rung: int) -> None:
    entry.rung, entry.level = rung, level_of(rung)
