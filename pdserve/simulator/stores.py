"""The stores of all hosts: what a worker's own has of a prompt, in memory and on its disk, and what
another has.

A prefix is looked for in all other stores at once: ``Holders`` has one bit set of hosts per block,
and walks along the prompt as the router's index does. Asking one store after the other would be a
look into each of a hundred maps, and all of them have the blocks that most prompts begin with.
"""

from collections.abc import Hashable, Sequence

from pdserve.config import SsdWrite
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


class Disk(BlockCache):
    """What lies below a store's memory. Writes take no time."""

    __slots__ = ("_gone", "write")

    def __init__(self, block_max: int | None, write: SsdWrite) -> None:
        super().__init__(block_max)
        self.write = write
        self._gone: list[Hashable] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self._keys

    def add(self, keys: Sequence[Hashable]) -> Sequence[Hashable]:
        """Those of a prompt's blocks are here from now on, or were used.

        Returns:
            what had to go for them, children first.
        """
        self.touch(keys)
        gone, self._gone = self._gone, []
        return gone

    def _came(self, key: Hashable) -> None:
        """Nobody is told: its store tells for both."""

    def _left(self, key: Hashable) -> None:
        self._gone.append(key)


class HostStore(BlockCache):
    """Of one host: its memory, and its disk where it has one. To others a block is here until both
    have lost it."""

    __slots__ = ("_bit", "_disk", "_holders")

    def __init__(
        self, block_max: int | None, host: int, holders: Holders | None, disk: Disk | None = None
    ) -> None:
        """``holders``: of all stores that this one's workers fetch from; None: they do not."""
        super().__init__(block_max)
        self._bit = 1 << host
        self._holders = holders
        self._disk = disk

    @property
    def fetches(self) -> bool:
        """Whether its workers fetch from other hosts."""
        return self._holders is not None

    @property
    def has_disk(self) -> bool:
        return self._disk is not None

    def prefix_blocks(self, keys: Sequence[Hashable]) -> int:
        known, disk = self._keys, self._disk
        if disk is None:
            return super().prefix_blocks(keys)
        for count, key in enumerate(keys):
            if key not in known and key not in disk:
                return count
        return len(keys)

    def memory_blocks(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks the disk is not needed for."""
        return super().prefix_blocks(keys)

    def blocks_elsewhere(self, keys: Sequence[Hashable]) -> int:
        """How many leading blocks another host has, of the one that has most of them."""
        holders = self._holders
        return 0 if holders is None else holders.prefix_blocks(keys, but=self._bit)

    def found(self, keys: Sequence[Hashable]) -> None:
        """A prompt takes these, its first blocks, from here: what lay on the disk comes up."""
        if self._disk is not None:
            known, always = self._keys, self._disk.write == "second_touch"
            below = [key for key in keys if key in self._disk or (always and key in known)]
            self._write_down(below)
        self.touch(keys)

    def stored(self, keys: Sequence[Hashable]) -> None:
        """A worker has computed these, a prompt's first blocks."""
        if self._disk is not None and self._disk.write == "write_through":
            for key in keys:
                if key not in self._disk and key not in self._keys:
                    self._came(key)
            self._write_down(keys)
        self.touch(keys)

    def _write_down(self, keys: Sequence[Hashable]) -> None:
        assert self._disk is not None
        for key in self._disk.add(keys):
            if key not in self._keys:
                self._lost(key)

    def _came(self, key: Hashable) -> None:
        if self._disk is not None and key in self._disk:
            return  # it was here all the time
        super()._came(key)
        if self._holders is not None:
            self._holders.add(key, self._bit)

    def _left(self, key: Hashable) -> None:
        if self._disk is not None:
            if self._disk.write == "on_evict":
                self._write_down((key,))
            if key in self._disk:
                return
        self._lost(key)

    def _lost(self, key: Hashable) -> None:
        super()._left(key)
        if self._holders is not None:
            self._holders.remove(key, self._bit)


def stores_of(settings: SimulationSettings, block_tokens: int) -> list[HostStore | None]:
    """One for each host; None where nothing is kept."""
    limit = settings.store_tokens
    if limit == 0:
        return [None] * settings.hosts
    block_max = None if limit is None else limit // block_tokens
    holders = Holders() if settings.fetches and settings.hosts > 1 else None
    return [
        HostStore(block_max, host, holders, _disk_of(settings, block_tokens))
        for host in range(settings.hosts)
    ]


def _disk_of(settings: SimulationSettings, block_tokens: int) -> Disk | None:
    limit = settings.disk_tokens
    if limit == 0 or settings.store_tokens is None:  # memory loses nothing
        return None
    return Disk(None if limit is None else limit // block_tokens, settings.disk_write)
