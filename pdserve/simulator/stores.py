"""The stores of all hosts: what a worker's own has of a prompt, and what another has."""

from collections.abc import Sequence

from pdserve.ids import BlockKey
from pdserve.simulator.caches import BlockCache
from pdserve.simulator.settings import SimulationSettings


class HostStore(BlockCache):
    """Of one host. ``others`` are those that its workers fetch from; none where they do not."""

    __slots__ = ("others",)

    def __init__(self, block_max: int | None) -> None:
        super().__init__(block_max)
        self.others: list[HostStore] = []

    def blocks_elsewhere(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks another host has, of the one that has most of them."""
        most = 0
        for other in self.others:
            most = max(most, other.prefix_blocks(keys))
        return most


def stores_of(settings: SimulationSettings, block_tokens: int) -> list[HostStore | None]:
    """One for each host; None where nothing is kept."""
    limit = settings.store_tokens
    if limit == 0:
        return [None] * settings.hosts
    block_max = None if limit is None else limit // block_tokens
    stores = [HostStore(block_max) for _ in range(settings.hosts)]
    for store in stores if settings.fetches else ():
        store.others = [other for other in stores if other is not store]
    return [*stores]
