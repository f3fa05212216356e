"""What a leading master knows: members, who has which block. Pure: no clock, no input or output.

The table of members says who may speak. Of each of them the core keeps a number, the sequence up to
which it has heard, and the locations of its blocks. An answer under another epoch than the table's
is refused; one that does not go on where the last one ended is a *gap*, and everything is asked
again. A node that cannot be reached has no locations: they come back with its next inventory.

An inventory may have millions of keys. It is *held* first; ``begin`` makes one build of all that
are held, which runs where it keeps nobody waiting, and ``finish`` says whose they were.

Nothing here needs to survive. A successor begins empty, asks every member for all it has, and knows
the same: ``is_whole`` says when.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pdserve.errors import FrameError, StaleEpoch
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, StoreId
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.masters.block_index import NODES_MAX, BlockIndex, Build, Columns
from pdserve.kvstore.masters.mastering import Deltas
from pdserve.kvstore.masters.metadata import Member

EVERYTHING = -1


@dataclass(slots=True)
class Host:
    """One member, as the master knows it."""

    member: Member
    number: int  # in the index
    sequence: int = EVERYTHING  # up to which its changes are known
    slots_free: int = 0
    block_bytes: int = 0
    codec: int = 0
    is_draining: bool = False
    under_way: int = 0  # that may bring blocks still, where it drains

    @property
    def is_in(self) -> bool:
        """Its inventory is known, and what came since."""
        return self.sequence != EVERYTHING

    def heard(self, deltas: Deltas) -> None:
        """Its changes are known up to these."""
        self.sequence = deltas.sequence
        self.slots_free = deltas.slots_free
        self.block_bytes, self.codec = deltas.block_bytes, deltas.codec
        self.is_draining, self.under_way = deltas.is_draining, deltas.under_way

    def takes_blocks_of(self, other: "Host") -> bool:
        return (
            self.number != other.number
            and self.is_in
            and not self.is_draining
            and (self.block_bytes, self.codec) == (other.block_bytes, other.codec)
        )


@dataclass(frozen=True, slots=True)
class _Inventory:
    host: Host  # as it was when this came
    deltas: Deltas
    body: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Turnover:
    """Members that are new, and those whose time is over. One with a new epoch is in both."""

    joined: tuple[Member, ...]
    left: tuple[Member, ...]


class MasterCore:
    def __init__(self, index: BlockIndex | None = None) -> None:
        self.index = BlockIndex() if index is None else index
        self.counters: Counter[str] = Counter()
        self._hosts: dict[StoreId, Host] = {}
        self._held: dict[StoreId, _Inventory] = {}
        self._building: tuple[_Inventory, ...] = ()
        self._is_known = False  # the table has been read

    @property
    def hosts(self) -> Collection[Host]:
        return self._hosts.values()

    @property
    def is_whole(self) -> bool:
        """All that is stored anywhere is in the index."""
        return self._is_known and all(host.is_in for host in self._hosts.values())

    def host(self, store_id: StoreId) -> Host | None:
        return self._hosts.get(store_id)

    def set_members(self, members: Sequence[Member]) -> Turnover:
        """The table, as it is now."""
        self._is_known = True
        after = {member.store_id: member for member in members}
        left = [
            host.member
            for host in self._hosts.values()
            if after.get(host.member.store_id) != host.member
        ]
        for member in left:
            self.index.drop(self._hosts.pop(member.store_id).number)
        joined = [member for member in members if member.store_id not in self._hosts]
        for member in joined:
            self._hosts[member.store_id] = Host(member, self._free_number())
        return Turnover(tuple(joined), tuple(left))

    def take(self, store_id: StoreId, deltas: Deltas, body: bytes | memoryview) -> bool:
        """A node's answer, at once. False: it has a gap, everything is to be asked for.

        Raises:
            StaleEpoch: it is of another incarnation than the member.
            FrameError: the body is not what the message says.
        """
        host = self._speaker(store_id, deltas, body)
        if deltas.is_whole:
            self.index.replace(host.number, body)
        elif deltas.after != host.sequence or deltas.sequence < deltas.after:
            self.counters["gaps"] += 1
            self.lost(store_id)
            return False
        else:
            split = deltas.added * BLOCK_KEY_BYTES
            self.index.apply(host.number, split_keys(body[:split]), split_keys(body[split:]))
        host.heard(deltas)
        return True

    def hold(self, store_id: StoreId, deltas: Deltas, body: bytes | memoryview) -> None:
        """A node's inventory, for the next build. Raises as ``take``."""
        assert deltas.is_whole
        self._held[store_id] = _Inventory(self._speaker(store_id, deltas, body), deltas, body)

    def is_held(self, store_id: StoreId) -> bool:
        return store_id in self._held

    def begin(self) -> Build:
        """Of all that is held; one at a time. Until ``finish`` nothing is to be taken."""
        held, self._held = self._held, {}
        self._building = tuple(each for each in held.values() if self._is_there(each.host))
        return self.index.begin({each.host.number: each.body for each in self._building})

    def finish(self, made: Columns | None) -> None:
        """What the build made; None: it failed, and the inventories have to be asked for again."""
        inventories, self._building = self._building, ()
        self.index.finish(made)
        for each in inventories:
            if made is not None and self._is_there(each.host):
                each.host.heard(each.deltas)

    def lost(self, store_id: StoreId) -> None:
        """Nobody knows what this node has: it does not answer, or not in order. Idempotent."""
        host = self._hosts.get(store_id)
        if host is not None and host.is_in:
            host.sequence = EVERYTHING
            self.index.drop(host.number)

    def copied(self, store_id: StoreId, keys: Sequence[BlockKey], blocks: int) -> None:
        """A node has these now, of which ``blocks`` are new; its own word comes a little later."""
        host = self._hosts.get(store_id)
        if host is not None and host.is_in:
            self.index.apply(host.number, keys, ())
            host.slots_free = max(0, host.slots_free - blocks)

    def holders(self, keys: Sequence[BlockKey]) -> list[tuple[Host, int]]:
        """Who has how many leading blocks of a chain: most first, draining nodes last."""
        counts = prefix_counts(self.index.nodes_of(keys))
        found = [
            (host, counts[host.number]) for host in self._hosts.values() if host.number in counts
        ]
        found.sort(key=lambda each: (each[0].is_draining, -each[1], each[0].member.store_id))
        return found

    def only_at(self, store_id: StoreId) -> list[BlockKey]:
        """What would be lost with this node; what only those have as well that drain counts."""
        host = self._hosts.get(store_id)
        if host is None:
            return []
        others = [each.number for each in self._hosts.values() if each.is_draining]
        return self.index.only_at(host.number, besides=others)

    def _speaker(self, store_id: StoreId, deltas: Deltas, body: bytes | memoryview) -> Host:
        host = self._hosts.get(store_id)
        if host is None or host.member.epoch != deltas.epoch:
            self.counters["fenced"] += 1
            raise StaleEpoch(
                f"{store_id} speaks under epoch {deltas.epoch}, the member has "
                f"{'none' if host is None else host.member.epoch}"
            )
        if (
            deltas.added < 0
            or deltas.removed < 0
            or (deltas.is_whole and deltas.removed)
            or (deltas.added + deltas.removed) * BLOCK_KEY_BYTES != len(body)
        ):
            raise FrameError(
                f"{len(body)} bytes for {deltas.added} keys that came, {deltas.removed} that went"
            )
        return host

    def _is_there(self, host: Host) -> bool:
        """And is the same member as when it spoke."""
        return self._hosts.get(host.member.store_id) is host

    def _free_number(self) -> int:
        taken = {host.number for host in self._hosts.values()}
        return next(number for number in range(NODES_MAX) if number not in taken)


def prefix_counts(nodes_by_block: Sequence[Sequence[int]]) -> dict[int, int]:
    """How many leading blocks each node has, of those that have the first one."""
    counts: dict[int, int] = {}
    alive = set(nodes_by_block[0]) if nodes_by_block else set()
    for position, nodes in enumerate(nodes_by_block):
        alive &= set(nodes)
        for node in alive:
            counts[node] = position + 1
    return counts
