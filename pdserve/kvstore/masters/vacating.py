"""Which chains to copy where, so that a node can go and what is worth most is kept. Pure.

What a node alone has are the lower ends of chains: a child is never there without its parent. Each
of those ends is copied as a chain, from its first block on, of which the target takes what it
lacks, parents first; what is worth most to its node comes first.

A target is one that has free slots for all that is missing; of those the one that has most of the
chain already, then the one with most free slots. Where there is none, a block may go for one that
is worth more, which only the target can tell (``entering``): one that has refused a tenant's block
is asked for no further one of it, since those that follow are worth less, until it has free slots.
A chain of which a target has taken a part is not cut in two: its rest is left.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pdserve.ids import BlockKey
from pdserve.kvstore.masters.core import Host
from pdserve.kvstore.masters.mastering import Child, Copied, Remembered
from pdserve.kvstore.masters.replication import Copy, Holders

NO_PARENT = BlockKey(bytes(16))

UNKNOWN = Remembered()


@dataclass(frozen=True, slots=True)
class Chains:
    """Of one node: each block's parent, ``NO_PARENT`` where it begins a chain, and what the node
    knows of it beside."""

    parents: Mapping[BlockKey, BlockKey]
    remembered: Mapping[BlockKey, Remembered] = field(default_factory=dict)
    tenants: tuple[str, ...] = ()

    @classmethod
    def of(cls, children: Iterable[Child], tenants: tuple[str, ...]) -> "Chains":
        parents, remembered = {}, {}
        for child in children:
            parents[child.key], remembered[child.key] = child.parent, child.remembered
        return cls(parents, remembered, tenants)

    def to(self, key: BlockKey) -> tuple[BlockKey, ...]:
        """The chain that ends with ``key``; () where its beginning is not there any more."""
        chain = [key]
        while (parent := self.parents.get(chain[-1])) is not None:
            if parent == NO_PARENT:
                return tuple(reversed(chain))
            if len(chain) > len(self.parents):
                return ()  # a circle: what another process says is not believed
            chain.append(parent)
        return ()

    def of_block(self, key: BlockKey) -> Remembered:
        return self.remembered.get(key, UNKNOWN)

    def tenant_of(self, key: BlockKey) -> str:
        account = self.of_block(key).account
        return self.tenants[account] if account < len(self.tenants) else ""


def ends_of(chains: Chains, alone: Collection[BlockKey]) -> list[tuple[BlockKey, ...]]:
    """Chains that contain all of ``alone``, each to a block that none of the others builds on; what
    is worth most first, then what is youngest."""
    wanted = set(alone)
    inner = {chains.parents.get(key) for key in wanted}

    def rank(key: BlockKey) -> tuple[float, int, BlockKey]:
        remembered = chains.of_block(key)
        return -remembered.worth, remembered.age_ms, key

    found = (chains.to(key) for key in sorted(wanted - inner, key=rank))
    return [chain for chain in found if chain]


class Vacating:
    """The copies of one drain. ``next_copy`` and ``done`` alternate: what one copy has changed must
    be known before the next is asked for."""

    def __init__(self, source: Host) -> None:
        self.moved = 0
        self.outweighed: set[BlockKey] = set()
        """For which there was nothing worth less elsewhere."""

        self._source = source
        self._chains = Chains({})
        self._queue: deque[tuple[BlockKey, ...]] = deque()
        self._seen: set[BlockKey] = set()
        self._asked: set[int] = set()  # hosts, for the first chain of the queue
        self._refused: set[tuple[int, str]] = set()  # hosts, each for a tenant

    def unseen(self, alone: Collection[BlockKey]) -> set[BlockKey]:
        """Those that no ``begin`` was told of yet."""
        return set(alone) - self._seen

    def begin(self, chains: Chains, alone: Collection[BlockKey]) -> None:
        """With what is there alone now; each block is tried once. What is new may be worth more
        than what was refused."""
        new = self.unseen(alone)
        self._seen |= new
        self._chains = chains
        self._queue = deque(ends_of(chains, new))
        self._asked.clear()
        self._refused.clear()

    def next_copy(self, holders: Holders, hosts: Collection[Host]) -> Copy | None:
        while self._queue:
            copy = self._copy_of(self._queue[0], holders, hosts)
            if copy is not None:
                return copy
            self._next_chain()
        return None

    def done(self, copy: Copy, copied: Copied | None) -> None:
        """None: it failed, and another target is asked."""
        if copied is None:
            return
        self.moved += copied.blocks
        if copied.is_outweighed:
            self._refused.add((copy.target.number, copy.tenant))
            self.outweighed.update(copy.keys[copied.present :])
        if copied.blocks:
            self._next_chain()

    def _next_chain(self) -> None:
        self._queue.popleft()
        self._asked.clear()

    def _copy_of(
        self, keys: tuple[BlockKey, ...], holders: Holders, hosts: Collection[Host]
    ) -> Copy | None:
        has = {host.number: count for host, count in holders(keys)}
        reach = has.get(self._source.number, 0)
        tenant = self._chains.tenant_of(keys[-1])
        others = [host for host in hosts if host.takes_blocks_of(self._source)]
        targets = [
            host
            for host in others
            if host.number not in self._asked
            and (host.slots_free or (host.number, tenant) not in self._refused)
        ]
        kept = max((has.get(host.number, 0) for host in others), default=0)
        if kept >= reach:
            return None  # it is not alone, or not there, any more
        if not targets:
            if any((host.number, tenant) in self._refused for host in others):
                self.outweighed.update(keys[kept:reach])
            return None

        def preference(host: Host) -> tuple[bool, int, int, str]:
            there = has.get(host.number, 0)
            fits = host.slots_free >= reach - there
            return not fits, -there, -host.slots_free, host.member.store_id

        target = min(targets, key=preference)
        self._asked.add(target.number)
        remembered = tuple(map(self._chains.of_block, keys[:reach]))
        missing = reach - has.get(target.number, 0)
        return Copy(keys[:reach], self._source, target, missing, remembered, tenant)
