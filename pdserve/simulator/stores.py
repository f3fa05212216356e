"""The stores of all hosts: what a worker's own has of a prompt, and what another has.

A prefix is looked for in all other stores at once: ``Holders`` has one bit set of hosts per block,
and walks along the prompt as the router's index does. Asking one store after the other would be a
look into each of a hundred maps, and all of them have the blocks that most prompts begin with.
"""

from collections.abc import Hashable, Sequence

from pdserve.simulator.caches import BlockCache
from pdserve.simulator.settings import SimulationSettings


class Holders:
    """Which hosts have which block."""

    __slots__ = ("_hosts",)

    def __init__(self) -> None:
        self._hosts: dict[Hashable, int] = {}  # bit sets, none of them empty

    def add(self, block: Hashable, host_bit: int) -> None:
        known = self._hosts.setdefault(block, host_bit)
        if known != host_bit:
            self._hosts[block] = known | host_bit

    def remove(self, block: Hashable, host_bit: int) -> None:
        left = self._hosts[block] & ~host_bit
        if left:
            self._hosts[block] = left
        else:
            del self._hosts[block]

    def prefix_blocks(self, keys: Sequence[Hashable], *, but: int) -> int:
        """How many leading blocks one host has, of the one that has most of them, the host with
        the bit ``but`` left aside."""
        hosts = self._hosts.get
        having = ~but
        for blocks, key in enumerate(keys):
            having &= hosts(key, 0)
            if not having:
                return blocks
        return len(keys)


class HostStore(BlockCache):
    """Of one host."""

    __slots__ = ("_bit", "_holders")

    def __init__(self, block_max: int | None, host: int, holders: Holders | None) -> None:
        """``holders``: of all stores that this one's workers fetch from; None: they do not."""
        super().__init__(block_max)
        self._bit = 1 << host
        self._holders = holders

    @property
    def fetches(self) -> bool:
        """Whether its workers fetch from other hosts."""
        return self._holders is not None

    def blocks_elsewhere(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks another host has, of the one that has most of them."""
        holders = self._holders
        return 0 if holders is None else holders.prefix_blocks(keys, but=self._bit)

    def _came(self, key: Hashable) -> None:
        if self._holders is not None:
            self._holders.add(key, self._bit)

    def _left(self, key: Hashable) -> None:
        if self._holders is not None:
            self._holders.remove(key, self._bit)


def stores_of(settings: SimulationSettings, block_tokens: int) -> list[HostStore | None]:
    """One for each host; None where nothing is kept."""
    limit = settings.store_tokens
    if limit == 0:
        return [None] * settings.hosts
    block_max = None if limit is None else limit // block_tokens
    holders = Holders() if settings.fetches and settings.hosts > 1 else None
    return [HostStore(block_max, host, holders) for host in range(settings.hosts)]
