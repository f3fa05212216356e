"""Who is a member of the store, and who was: epochs decide, not clocks.

Every join draws a fresh epoch. Whoever speaks for a node says the epoch it joined under; one that
is older than the entry belongs to a predecessor that does not know of its own end, and is refused.
"""

from collections.abc import Sequence

from pdserve.errors import StoreError
from pdserve.ids import StoreId
from pdserve.kvstore.metadata import Member, Metadata
from pdserve.messages import Address


class Master:
    """Keeps no state of its own: any number of them over one ``Metadata`` agree."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def join(self, store_id: StoreId, address: Address, *, dead: Sequence[StoreId] = ()) -> Member:
        """Enter a node under a fresh epoch, which fences its predecessors of the same id.

        ``dead`` are nodes of its host that it found dead: their entries go.
        """
        member = Member(store_id, address, self._metadata.next_epoch())
        for each in dead:
            self._metadata.remove(each, member.epoch)
        self._metadata.register(member)
        return member

    def leave(self, member: Member) -> None:
        """Idempotent; a successor's entry stays."""
        self._metadata.remove(member.store_id, member.epoch)

    def members(self) -> tuple[Member, ...]:
        return self._metadata.members()

    def check(self, store_id: StoreId, epoch: int) -> Member:
        """The entry of a node that speaks under ``epoch``.

        Raises:
            StoreError: it is no member, or another epoch is.
        """
        for member in self._metadata.members():
            if member.store_id == store_id:
                if member.epoch == epoch:
                    return member
                raise StoreError(
                    f"{store_id} is a member under epoch {member.epoch}, not under {epoch}"
                )
        raise StoreError(f"{store_id} is no member of the store")
