"""A write whose blocks arrive in pieces, while the rest of them is still being computed.

Each block is filled from its beginning to its end. Its checksum is taken from the pieces as they
pass, and is that of the whole block: XXH3 reads its input as a stream. The slots are the writer's
until it commits or gives up, like those of any other write; nothing of them can be found before.
"""

from collections.abc import Callable, Sequence

from pdserve.ids import BlockKey
from pdserve.kvstore.answers import WriteGrant
from pdserve.kvstore.arena import Arena, checksum_of


class PiecewiseWrite:
    """Made by ``StoreClient.begin_push`` and ``begin_tail``, ended by ``finish`` or ``give_up``."""

    def __init__(self, grant: WriteGrant, keys: Sequence[BlockKey | None], arena: Arena) -> None:
        self.grant = grant
        self._payloads = [arena.payload(slot) for slot in grant.slots]
        self._checksums = [checksum_of(keys[index]) for index in self.indices]
        self._filled = [0] * len(grant.slots)

    @property
    def indices(self) -> range:
        """Of the keys whose blocks are to be filled; the others are stored already."""
        return range(self.grant.first_index, self.grant.first_index + len(self.grant.slots))

    def next_pieces(self, count: int) -> list[tuple[int, memoryview]]:
        """Where the next ``count`` bytes of each block go."""
        starts = zip(self.indices, self._payloads, self._filled, strict=True)
        return [(index, payload[start : start + count]) for index, payload, start in starts]

    def add(self, index: int, count: int, fill: Callable[[memoryview], None]) -> None:
        """``fill`` writes the next ``count`` bytes of the block of key ``index``."""
        place = index - self.grant.first_index
        start = self._filled[place]
        piece = self._payloads[place][start : start + count]
        assert len(piece) == count, f"{start} and {count} bytes of {len(self._payloads[place])}"
        fill(piece)
        self._checksums[place].update(piece)
        self._filled[place] += count

    def complete(self) -> tuple[list[memoryview], tuple[int, ...]]:
        """All blocks and their checksums."""
        for payload, filled in zip(self._payloads, self._filled, strict=True):
            assert filled == len(payload), f"{filled} of {len(payload)} bytes are there"
        return self._payloads, tuple(checksum.intdigest() for checksum in self._checksums)
