"""What a client holds of a store: blocks that stay as they are until it lets go."""

import weakref
from dataclasses import dataclass, field

from pdserve.ids import BlockKey
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.hazards import Run


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks that stay as they are until ``StoreClient.release``.

    Block ``index`` < ``count`` is the prefix's block of that index. With ``has_tail`` there is one
    more, the unfinished last block of a ticket, at index ``count``.
    """

    grant: ClaimGrant
    keys: tuple[BlockKey, ...]  # of the first blocks, as far as the reader knows them
    run: Run | None = None  # where the client has pinned them itself; None: the node has
    views: list[tuple[memoryview, "weakref.ref[object]"]] = field(
        default_factory=list, compare=False, repr=False
    )
    """What ``StoreClient.view`` gave out, and of each what lives as long as it has users."""

    @property
    def count(self) -> int:
        return len(self.grant.slots) - self.grant.has_tail

    @property
    def has_tail(self) -> bool:
        return self.grant.has_tail

    def key_of(self, index: int) -> BlockKey | None:
        """What block ``index`` must be; None where the reader does not know."""
        assert 0 <= index < len(self.grant.slots), f"block {index} of {len(self.grant.slots)}"
        return self.keys[index] if index < len(self.keys) else None
