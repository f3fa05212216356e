"""Who is a member of the store, and who was: epochs decide, not clocks.

Every join draws a fresh epoch. Whoever speaks for a node says the epoch it joined under; one that
is older than the entry belongs to a predecessor that does not know of its own end, and is refused.

A master that gets no answer from a node removes its entry. Such a node, if it lives, finds that out
when it next looks (``keep``) and joins again, under an epoch of which nobody knows anything yet;
one whose place a successor has taken ends.
"""

from collections.abc import Sequence

from pdserve.errors import StaleEpoch, StoreError
from pdserve.ids import StoreId
from pdserve.kvstore.masters.metadata import Member, Metadata
from pdserve.messages import Address


class Membership:
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

    def keep(self, member: Member) -> Member:
        """The node's entry as it is from now on: another one where it had been removed.

        Raises:
            StaleEpoch: a successor has its place.
        """
        if self._is_there(member):
            return member
        # Drawn before the second look: a successor that joins meanwhile has a later one and stays.
        # Above its own: a table that was restored from yesterday's has an earlier count.
        epoch = self._metadata.next_epoch(above=member.epoch)
        if self._is_there(member):
            return member
        again = Member(member.store_id, member.address, epoch)
        self._metadata.register(again)
        return again

    def leave(self, member: Member) -> None:
        """Idempotent; a successor's entry stays."""
        self._metadata.remove(member.store_id, member.epoch)

    def members(self) -> tuple[Member, ...]:
        return self._metadata.members()

    def check(self, store_id: StoreId, epoch: int) -> Member:
        """The entry of a node that speaks under ``epoch``.

        Raises:
            StaleEpoch: another epoch is a member.
            StoreError: none is.
        """
        member = self._find(store_id)
        if member is None:
            raise StoreError(f"{store_id} is no member of the store")
        if member.epoch != epoch:
            raise StaleEpoch(
                f"{store_id} is a member under epoch {member.epoch}, not under {epoch}"
            )
        return member

    def _is_there(self, member: Member) -> bool:
        found = self._find(member.store_id)
        if found is not None and found.epoch > member.epoch:
            raise StaleEpoch(
                f"{member.store_id} is a member under epoch {found.epoch}, not under "
                f"{member.epoch}: a successor has taken over, this node must end"
            )
        return found == member

    def _find(self, store_id: StoreId) -> Member | None:
        return next((each for each in self.members() if each.store_id == store_id), None)
