"""The store with one guard taken away: each must turn the campaign red.

Guards stand behind each other (a pin, the generation, the key, the checksum), and what one lets
through the next one stops. Where a guard is not the first, a *fault* makes those before it fail:
pins are forgotten, bytes are damaged, records change places on the disk. The *control* of such a
mutant is the fault with the guard in place, and must stay green.

The changes are made in the campaign's own processes, by subclasses and by replaced functions; the
product has no switch for them.
"""

import random
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdserve.errors import BlockMissing, TicketGone
from pdserve.ids import BlockKey, SlotId, TicketId
from pdserve.kvstore import metadata, node, ssd_log, transfer
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.pipeline import Corrupt
from pdserve.kvstore.readers import NOBODY, Readers
from pdserve.kvstore.server import StoreServer
from pdserve.kvstore.slots import Slot, SlotState
from pdserve.kvstore.tickets import OwnerId
from pdserve.kvstore.writes import Write, commit_write, drop_write
from pdserve.wire.connection import Frame

DAMAGED_RATIO = 0.02
LEASE_S = 0.05
FORGOTTEN_RATIO = 0.001
FOREVER_S = 1e6


# ── a node's core without a guard ────────────────────────────────────────────────────────────────


class PublishesEarly(StoreCore):
    """A put's blocks are in the index before their bytes are in the slots."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._early: dict[int, Write] = {}

    def reserve(
        self, owner: OwnerId, keys: Sequence[BlockKey], first: int, **options: Any
    ) -> WriteGrant:
        grant = super().reserve(owner, keys, first, **options)
        if grant.write:
            write = self._owners[owner].writes.pop(grant.write)
            write.checksums = [0] * len(write.slots)
            commit_write(self._slots, write)
            self._slots.pin(write.slots)  # nobody evicts what is being written
            self._early[grant.write] = write
        return grant

    def to_fill(
        self, owner: OwnerId, write_id: int, position: int
    ) -> tuple[SlotId, BlockKey | None]:
        write = self._early.get(write_id)
        if write is None:
            return super().to_fill(owner, write_id, position)
        return write.slots[position], write.keys[write.first_index + position]

    def filled(self, owner: OwnerId, write_id: int, position: int, checksum: int) -> None:
        write = self._early.get(write_id)
        if write is None:
            super().filled(owner, write_id, position, checksum)
            return
        self._slots[write.slots[position]].checksum = checksum
        self._slots._changed.add(write.slots[position])

    def keys_of(self, owner: OwnerId, write_id: int) -> tuple[BlockKey, ...]:
        write = self._early.get(write_id)
        return super().keys_of(owner, write_id) if write is None else write.keys

    def commit(self, owner: OwnerId, write_id: int) -> int:
        write = self._early.pop(write_id, None)
        if write is None:
            return super().commit(owner, write_id)
        self._slots.unpin(write.slots)
        self.tickets.grant()
        return len(write.keys) - write.asked_index

    def abandon(self, owner: OwnerId, write_id: int) -> None:
        if write_id in self._early:
            self.commit(owner, write_id)
        else:
            super().abandon(owner, write_id)


class UnseenReaders:
    """Those who pin by themselves, and what of it a node overlooks."""

    def __init__(self, readers: Readers, *, hides: bool) -> None:
        self._readers = readers
        self._hides = hides

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        held = self._readers.hide(slots)
        return held if self._hides else ()

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return ()


class LooksTooLate(StoreCore):
    """What readers pin by themselves is seen when its block has been evicted, and not before."""

    def __init__(self, *arguments: Any, readers: Readers = NOBODY, **options: Any) -> None:
        seen = UnseenReaders(readers, hides=True)
        super().__init__(*arguments, readers=seen, **options)


class IgnoresBoards(StoreCore):
    """A slot that a reader's board names is given to a writer."""

    def __init__(self, *arguments: Any, readers: Readers = NOBODY, **options: Any) -> None:
        seen = UnseenReaders(readers, hides=False)
        super().__init__(*arguments, readers=seen, **options)


class ForgetsClaims(StoreCore):
    """Whoever asks for blocks is told that it has them, and nobody keeps them from eviction."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._promised: dict[int, list[SlotId]] = {}

    def claim(self, owner: OwnerId, keys: Sequence[BlockKey]) -> ClaimGrant:
        return self._granted(owner, super().claim(owner, keys))

    def adopt(self, owner: OwnerId, ticket_id: TicketId) -> ClaimGrant:
        return self._granted(owner, super().adopt(owner, ticket_id))

    def _granted(self, owner: OwnerId, grant: ClaimGrant) -> ClaimGrant:
        if grant.claim:
            self._forget(owner, grant.claim)
        return grant

    def _forget(self, owner: OwnerId, claim: int) -> None:
        slots = self._owners[owner].claims[claim]
        self._owners[owner].claims[claim] = []
        self._promised[claim] = slots
        self._slots.unpin(slots)

    def claimed(self, owner: OwnerId, claim: int, index: int) -> tuple[SlotId, Slot]:
        slots = self._promised.get(claim)
        if slots is None:
            return super().claimed(owner, claim, index)
        slot = self._slots[slots[index]]
        if slot.state not in (SlotState.COMMITTED, SlotState.PRIVATE):
            raise BlockMissing(f"block {index} of claim {claim} is {slot.state}")
        return slots[index], slot

    def condemn(self, owner: OwnerId, claim: int, index: int) -> None:
        if claim not in self._promised:  # else there is no pin that would hold it meanwhile
            super().condemn(owner, claim, index)

    def release(self, owner: OwnerId, claim: int) -> None:
        super().release(owner, claim)
        self._promised.pop(claim, None)


class ForgetsPins(ForgetsClaims, IgnoresBoards):
    """Neither what the node has pinned nor what readers have pinned themselves is kept."""


class LeasesPins(ForgetsClaims):
    """A timer ends claims, whether their owner still reads or not."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._until_s: dict[int, tuple[OwnerId, float]] = {}

    def _granted(self, owner: OwnerId, grant: ClaimGrant) -> ClaimGrant:
        now_s = time.monotonic()
        for claim, (whose, until_s) in list(self._until_s.items()):
            if now_s >= until_s:
                del self._until_s[claim]
                if self._owners[whose].claims.get(claim):
                    self._forget(whose, claim)
        if grant.claim:
            self._until_s[grant.claim] = (owner, now_s + LEASE_S)
        return grant

    def disconnect(self, owner: OwnerId) -> None:
        super().disconnect(owner)
        self._until_s = {c: held for c, held in self._until_s.items() if held[0] != owner}


class ReusesAborted(StoreCore):
    """The slots of an aborted ticket are free at once, while its writer still fills them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._aborted: set[int] = set()

    def abort(self, ticket_id: TicketId) -> None:
        ticket = self.tickets.find(ticket_id)
        super().abort(ticket_id)
        for owner in self._owners.values():
            for write_id, write in list(owner.writes.items()):
                if ticket is not None and write.ticket is ticket:
                    del owner.writes[write_id]
                    drop_write(self._slots, write)
                    self._aborted.add(write_id)
        self.tickets.grant()

    def filled(self, owner: OwnerId, write_id: int, position: int, checksum: int) -> None:
        if write_id not in self._aborted:
            super().filled(owner, write_id, position, checksum)

    def to_fill(
        self, owner: OwnerId, write_id: int, position: int
    ) -> tuple[SlotId, BlockKey | None]:
        if write_id in self._aborted:
            raise TicketGone(f"the ticket of write {write_id} was aborted")
        return super().to_fill(owner, write_id, position)

    def keys_of(self, owner: OwnerId, write_id: int) -> tuple[BlockKey, ...]:
        return () if write_id in self._aborted else super().keys_of(owner, write_id)

    def commit(self, owner: OwnerId, write_id: int) -> int:
        if write_id in self._aborted:
            raise TicketGone(f"the ticket of write {write_id} was aborted")
        return super().commit(owner, write_id)


class StoresOrphans(StoreCore):
    """A put whose parent is not stored is taken as if it began a chain."""

    def reserve(
        self, owner: OwnerId, keys: Sequence[BlockKey], first: int, **options: Any
    ) -> WriteGrant:
        if len(self._slots.lookup(keys)) >= first:
            return super().reserve(owner, keys, first, **options)
        grant = super().reserve(owner, keys[first:], 0, **options)
        return replace(grant, first_index=grant.first_index + first)


class KeepsForTheDead(StoreCore):
    """What a dead connection had pinned stays pinned."""

    def disconnect(self, owner: OwnerId) -> None:
        self._owners[owner].claims.clear()
        self.room._held.pop(owner, None)
        super().disconnect(owner)


def _core(cls: type[StoreCore]) -> Callable[[], None]:
    def change() -> None:
        node.StoreCore = cls  # type: ignore[attr-defined]

    return change


# ── other parts without a guard ──────────────────────────────────────────────────────────────────


class _Anything(int):
    """Equal to every number."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, int)

    __hash__ = int.__hash__


def _ignore_generations() -> None:
    for cls in (transfer.SharedMemory, transfer.Sockets):
        _ignore_generations_of(cls)


def _ignore_generations_of(cls: Any) -> None:
    receive = cls.receive

    def receive_any(self: Any, claim: ClaimGrant, *arguments: Any) -> None:
        receive(self, _of_any_generation(claim), *arguments)

    cls.receive = receive_any


def _of_any_generation(claim: ClaimGrant) -> ClaimGrant:
    return replace(claim, generations=tuple(_Anything(each) for each in claim.generations))


def _ignore_what_the_disk_gives() -> None:
    ssd_log.block_checksum = lambda key, payload: _Anything()  # type: ignore[attr-defined]


def _forget_some_answers() -> None:
    take = StoreServer._take
    chance = random.Random(1)

    def take_or_forget(
        self: StoreServer, owner: OwnerId, connection: Any, capability: Any, frame: Frame
    ) -> Any:
        answer, body, sent = take(self, owner, connection, capability, frame)
        if chance.random() >= FORGOTTEN_RATIO:
            return answer, body, sent
        if sent is not None:
            sent()
        return None, (), None

    change: Any = StoreServer
    change._take = take_or_forget


def _wait_for_ever() -> None:
    call = StoreClient._call

    def call_for_ever(self: StoreClient, message: object, *arguments: Any, **options: Any) -> Any:
        return call(self, message, *arguments, **{**options, "timeout_s": FOREVER_S})

    change: Any = StoreClient
    change._call = call_for_ever


def _believe_everybody() -> None:
    """Who speaks last is the member, whatever its epoch."""

    def register(self: Any, member: metadata.Member) -> None:
        with self._transaction() as table:
            table.execute(
                "INSERT OR REPLACE INTO member VALUES (?, ?, ?)",
                (member.store_id, member.epoch, metadata._to_json(member)),
            )

    def remove(self: Any, store_id: str, epoch: int) -> None:
        with self._transaction() as table:
            table.execute("DELETE FROM member WHERE store_id = ?", (store_id,))

    change: Any = metadata.EmbeddedMetadata
    change.register, change.remove = register, remove
    for name in ("_REGISTER", "_REMOVE"):
        script = getattr(metadata, name)
        unfenced = script.replace("if known > tonumber(ARGV[2]) then return 0 end", "")
        assert unfenced != script
        setattr(metadata, name, unfenced)


# ── the list ─────────────────────────────────────────────────────────────────────────────────────


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A guard that is gone, beside the fault that reaches it."""

    name: str
    guard: str
    fault: str = ""
    change_node: Callable[[], None] = _nothing
    change_client: Callable[[], None] = _nothing
    budget_s: float = 60.0
    all_verify: bool = False
    no_verify: bool = False
    tolerates_misses: bool = False
    views: bool = True  # readers look at bytes where they lie; then a pin is their only guard
    tolerates_hang_ups: bool = False  # a node that does not answer is taken for dead
    damages_writes: bool = False
    swaps_records: bool = False

    @property
    def is_nodes(self) -> bool:
        return self.change_node is not _nothing

    @property
    def is_control(self) -> bool:
        return not self.guard

    def corrupts(self, name: str, chance: random.Random) -> Corrupt | None:
        """What an actor of that name does to bytes on their way."""
        if not self.damages_writes or not name.startswith(("writer", "prefill")):
            return None

        def damage(view: memoryview) -> None:
            if chance.random() < DAMAGED_RATIO:
                view[chance.randrange(len(view))] ^= 1 << chance.randrange(8)

        return damage


_FORGOTTEN: dict[str, Any] = {
    "fault": "the node forgets its pins",
    "change_node": _core(ForgetsPins),
    "all_verify": True,
    "tolerates_misses": True,
    "views": False,
}
_LATE: dict[str, Any] = {"fault": "the node looks at no board before it evicts"}
_UNANSWERED: dict[str, Any] = {
    "fault": "the node forgets one answer in a thousand",
    "change_node": _forget_some_answers,
    "tolerates_hang_ups": True,
}
_DAMAGED: dict[str, Any] = {
    "fault": "one block in fifty is damaged after its checksum was taken",
    "damages_writes": True,
    "tolerates_misses": True,
}
_SWAPPED: dict[str, Any] = {
    "fault": "records change places on the disk",
    "swaps_records": True,
}

ALL: tuple[Mutant, ...] = (
    Mutant(
        name="commit-last",
        guard="a block is found once its bytes are there",
        change_node=_core(PublishesEarly),
    ),
    Mutant(
        name="pins",
        guard="what is claimed is not evicted",
        change_node=_core(ForgetsPins),
    ),
    Mutant(
        name="hazards",
        guard="a slot that a reader's board names is not reused",
        change_node=_core(IgnoresBoards),
        **_LATE,
    ),
    Mutant(
        name="no-timer",
        guard="only its owner ends a claim",
        change_node=_core(LeasesPins),
    ),
    Mutant(
        name="quarantine",
        guard="an aborted write's slots are its writer's until it says so",
        change_node=_core(ReusesAborted),
    ),
    Mutant(
        name="parent-present",
        guard="a block is stored after its parent",
        change_node=_core(StoresOrphans),
    ),
    Mutant(
        name="owner-death",
        guard="what the dead held is released",
        change_node=_core(KeepsForTheDead),
    ),
    Mutant(
        name="epoch-fence",
        guard="an older epoch neither replaces nor removes a younger one",
        change_node=_believe_everybody,
    ),
    Mutant(
        name="generation",
        guard="a reader compares the slot's generation",
        change_client=_ignore_generations,
        **_FORGOTTEN,
    ),
    Mutant(
        name="checksum",
        guard="a reader verifies the checksum",
        no_verify=True,
        **_DAMAGED,
    ),
    Mutant(
        name="disk-key",
        guard="a record's checksum covers its key",
        change_node=_ignore_what_the_disk_gives,
        **_SWAPPED,
    ),
    Mutant(
        name="deadline",
        guard="a call waits for its answer until its deadline",
        change_client=_wait_for_ever,
        **_UNANSWERED,
    ),
)
MUTANTS = {
    mutant.name: mutant
    for mutant in (
        *ALL,
        Mutant(name="control-generation", guard="", **_FORGOTTEN),
        Mutant(name="control-hazards", guard="", change_node=_core(LooksTooLate), **_LATE),
        Mutant(name="control-checksum", guard="", all_verify=True, **_DAMAGED),
        Mutant(name="control-disk-key", guard="", **_SWAPPED),
        Mutant(name="control-deadline", guard="", **_UNANSWERED),
    )
}
"""By name; the controls too, which have a fault and every guard."""
