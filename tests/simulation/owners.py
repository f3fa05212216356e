"""Whose bytes lie in a worker's pool: I2, where a prefix is found on the device itself.

The same prompt leaves the same bytes whoever sends it, so no token tells that a block was another
tenant's. Hence each block has beside it the tenant who held it first since it was taken, and before
every forward pass all blocks that it may read are looked at.
"""

from collections.abc import Callable, Iterable
from typing import Any

from pdserve.engine.blocks import BlockPool
from pdserve.engine.sequence import Sequence
from pdserve.ids import BlockId
from tests.unit.engine.fakes import FakeRunner


class OwnedPool(BlockPool):
    def __init__(self, block_count: int) -> None:
        super().__init__(block_count)
        self._tenants: dict[BlockId, str] = {}

    def take(self, count: int) -> list[BlockId]:
        taken = super().take(count)
        for block in taken:
            self._tenants.pop(block, None)  # what was in it is overwritten
        return taken

    def foreign(self, sequences: Iterable[Sequence]) -> str | None:
        """What is wrong, where a sequence has a block that is another tenant's."""
        for sequence in sequences:
            tenant = sequence.request.tenant
            for block in sequence.blocks:
                owner = self._tenants.setdefault(block, tenant)
                if owner != tenant:
                    return f"I2: {tenant} reads block {block}, which is {owner}'s, in a pool"
        return None


class WatchedRunner(FakeRunner):
    """That has somebody look before each step."""

    look: Callable[[], None]

    def step(self, *args: Any, **named: Any) -> Any:
        self.look()
        return super().step(*args, **named)
