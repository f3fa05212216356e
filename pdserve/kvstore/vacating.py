"""Which chains to copy where, so that a node can go and nothing is lost. Pure.

What a node alone has are the lower ends of chains: a child is never there without its parent. Each
of those ends is copied as a chain, from its first block on, of which the target takes what it
lacks. A target is one that has most of the chain already, of equals the one with most free slots;
one whose free slots do not hold what is missing gets the part that they hold, parents first.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pdserve.ids import BlockKey
from pdserve.kvstore.master_core import Host
from pdserve.kvstore.replication import Copy, Holders

NO_PARENT = BlockKey(bytes(16))


@dataclass(frozen=True, slots=True)
class Chains:
    """Of one node: each block's parent, ``NO_PARENT`` where it begins a chain."""

    parents: Mapping[BlockKey, BlockKey]

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


def ends_of(chains: Chains, alone: Collection[BlockKey]) -> list[tuple[BlockKey, ...]]:
    """Chains that contain all of ``alone``, each to a block that none of the others builds on."""
    wanted = set(alone)
    inner = {chains.parents.get(key) for key in wanted}
    found = (chains.to(key) for key in sorted(wanted - inner))
    return [chain for chain in found if chain]


def copies_of(
    source: Host,
    found: Sequence[tuple[BlockKey, ...]],
    holders: Holders,
    hosts: Collection[Host],
) -> Iterator[Copy]:
    """One after the other: what the one before has changed must be known before the next is asked
    for. A chain that fits nowhere is left out."""
    for keys in found:
        has = {host.number: count for host, count in holders(keys)}
        targets = [host for host in hosts if host.takes_blocks_of(source) and host.slots_free > 0]
        if not targets:
            return
        target = min(
            targets,
            key=lambda host: (-has.get(host.number, 0), -host.slots_free, host.member.store_id),
        )
        before = has.get(target.number, 0)
        reach = min(has.get(source.number, 0), before + target.slots_free)
        if reach > before:
            yield Copy(keys[:reach], source, target, reach - before)
