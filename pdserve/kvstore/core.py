"""Every decision of a store node: who holds what, who waits, what is found. No input or output.

Events come in as method calls, each naming the *owner*: the client connection it came over. What
an owner holds is a *claim* (pins on blocks it reads), a *write* (slots it is filling at this
moment) or a *ticket*. When its connection ends, whatever it holds is released: a closed connection
means a process that can touch the slots no more. No timer ever frees memory that somebody may use.

A write has two halves. ``reserve*`` gives slots; the owner fills them; ``commit`` puts them into
the index, parents first, in one step. Whoever dies in between leaves nothing that can be found.
Two writers of one key fill a slot each: the second commit finds the first one's block and drops its
own copy. Nobody ever waits for another writer.

While a write is open its slots are the writer's, even when the ticket it was for is aborted by
somebody else: they become free when the writer says that it is done, or its connection ends.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

from pdserve.errors import BlockMissing, FrameError, TicketGone
from pdserve.ids import BlockKey, RequestId, SlotId, TicketId
from pdserve.kvstore.answers import ClaimGrant, StoreChanges, StoreStat, WriteGrant
from pdserve.kvstore.audit import misfits, stat_of
from pdserve.kvstore.contents import Contents
from pdserve.kvstore.entering import make_room_for
from pdserve.kvstore.eviction import EvictionName, eviction_of
from pdserve.kvstore.feed import CHANGES_MAX, ChangeFeed
from pdserve.kvstore.inheritance import Inheritance
from pdserve.kvstore.pins import PinBook
from pdserve.kvstore.readers import NOBODY, Readers, Room
from pdserve.kvstore.slot_states import Evicted, Past, Slot, SlotState
from pdserve.kvstore.slots import SlotTable
from pdserve.kvstore.tickets import (
    ANYBODY,
    OwnerId,
    Ticket,
    TicketBook,
    TicketState,
)
from pdserve.kvstore.writes import (
    Owner,
    Write,
    check_keys,
    commit_write,
    drop_write,
    refuse_if_full,
)

CLAIMS_MAX = 4096
"""Claims that one connection may hold."""

WRITES_MAX = 64
"""Writes that one connection may have open."""


class StoreCore:
    """Invariants, asserted by ``check``: those of ``SlotTable``; every RESERVED slot belongs to
    exactly one write or ticket; a slot's pins are what claims, writes and tickets account for; the
    first ticket in the queue does not fit.
    """

    def __init__(
        self,
        slot_count: int,
        *,
        eviction: EvictionName = "turns",
        lower: Collection[BlockKey] = (),
        readers: Readers = NOBODY,
        changes_max: int = CHANGES_MAX,
        shares: Mapping[str, float] | None = None,
        hard_pins_max: int = 0,
        inheritance: Inheritance | None = None,
    ) -> None:
        """``lower``: the blocks of the tier below, which somebody else moves and keeps up to date.
        They count as stored; ``claim`` finds those in the arena. ``readers`` pin by themselves.
        ``shares``: tenants' weights; None: all alike. ``inheritance``: of a dead node."""
        self._feed = ChangeFeed(lower=lower, changes_max=changes_max)
        for key in lower:
            self._feed.note(key, True)
        order = eviction_of(eviction, slot_count)
        self.slots = self._slots = SlotTable(
            slot_count, self._feed, order, readers.hide, shares=shares
        )
        self.contents = Contents(self._slots, lower, self._feed)
        self._owners: dict[OwnerId, Owner] = {}
        self.room = Room(self._slots, readers)
        """For the shell: what those did who read without asking."""

        if inheritance is not None:
            self.room.inherit(inheritance)
        self.tickets = TicketBook(self._slots, self.room)
        """For the shell: who was granted, whose time is up."""

        self.pins = PinBook(self._slots, hard_pins_max, self.tickets.grant)
        self._next_id = 0  # of owners, claims and writes together

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def connect(self, name: str) -> OwnerId:
        owner = OwnerId(self._new_id())
        self._owners[owner] = Owner(name)
        return owner

    def disconnect(self, owner: OwnerId) -> None:
        """Release everything that ``owner`` holds, and the tickets that wait for its name."""
        record = self._owners.pop(owner)
        for write in record.writes.values():
            drop_write(self._slots, write)
        for slots in record.claims.values():
            self._slots.unpin(slots)
        self.room.forget(owner)
        is_last_of_name = not self._is_connected(record.name)
        for ticket in self.tickets:
            if ticket.is_writers:
                dead = ticket.writer == owner
            else:
                dead = is_last_of_name and ticket.reader == record.name
            if dead:
                self.tickets.end(ticket)
        self.tickets.grant()

    def predecessors_gone(self) -> None:
        """No client of an earlier node of this arena is there any more."""
        self.room.predecessors_gone()
        self.tickets.grant()

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def claim(self, owner: OwnerId, keys: Sequence[BlockKey]) -> ClaimGrant:
        """Pin the longest prefix of ``keys`` that is stored, for a prompt that asks for it."""
        grant = self.hold(owner, keys)
        self._slots.asked(keys, grant.slots)
        return grant

    def hold(self, owner: OwnerId, keys: Sequence[BlockKey]) -> ClaimGrant:
        """``claim``, but for no prompt: what is known of its conversation stays as it is."""
        slots = self._slots.lookup(keys)
        if slots:
            refuse_if_full(len(self._owners[owner].claims), CLAIMS_MAX, "claims")
            self._slots.pin(slots)
        return self._new_claim(owner, slots, has_tail=False)

    def prefix_count(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks are in the arena."""
        return len(self._slots.lookup(keys))

    @property
    def owners(self) -> Mapping[OwnerId, Owner]:
        """For those who look through the books; they change nothing."""
        return self._owners

    def knows(self, owner: OwnerId) -> bool:
        return owner in self._owners

    def release(self, owner: OwnerId, claim: int) -> None:
        """Idempotent."""
        slots = self._owners[owner].claims.pop(claim, None)
        if slots is not None:
            self._slots.unpin(slots)
            self.tickets.grant()

    def claimed(self, owner: OwnerId, claim: int, index: int) -> tuple[SlotId, Slot]:
        """The slot behind block ``index`` of a claim.

        Raises:
            BlockMissing: it has been found to be wrong since it was claimed.
        """
        slot = self._slot_of(owner, claim, index)
        record = self._slots[slot]
        if record.state is SlotState.QUARANTINED:
            raise BlockMissing(f"block {index} of claim {claim} failed its checksum earlier")
        return slot, record

    def condemn(self, owner: OwnerId, claim: int, index: int) -> None:
        """The owner found that a block it holds fails its checksum: nobody finds it again."""
        self._slots.condemn(self._slot_of(owner, claim, index))
        self._let_go_of_condemned()

    def condemn_slot(self, owner: OwnerId, slot: SlotId, generation: int) -> None:
        """``condemn`` for an owner that has pinned the block by itself; nothing happens where it
        has not, or the slot has another block by now."""
        self.room.condemn(owner, slot, generation)
        self._let_go_of_condemned()

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def reserve(
        self,
        owner: OwnerId,
        keys: Sequence[BlockKey],
        first: int,
        *,
        tenant: str = "",
        between_tiers: bool = False,
        pasts: Sequence[Past] = (),
    ) -> WriteGrant:
        """Slots for those of ``keys[first:]`` that are not stored; fewer when memory is short.

        None at all when the parent of ``keys[first]`` is not stored, or hand-offs wait for memory.
        ``tenant``: on whose account; it gets no slots that are within another's share.
        ``between_tiers``: as in ``hold``, no conversation goes on. ``pasts``: of ``keys``, which
        come from a node that is emptied, and enter as ``entering`` says.
        """
        check_keys(keys, first)
        refuse_if_full(len(self._owners[owner].writes), WRITES_MAX, "writes")
        prefix = self._slots.lookup(keys)
        present = len(prefix)
        stored = max(0, present - first)
        wanted = len(keys) - present
        kept = [self._slots.past(slot) for slot in prefix] if pasts else []
        self._slots.pin(prefix)  # before anything is evicted for what continues it
        may_write = present >= first and not self.tickets.queued_count
        reach = self._slots.free_count + self._slots.order.reach(tenant)
        if pasts and may_write:
            count = make_room_for(self.room, self._slots, pasts[present:], tenant)
        else:
            count = self.room.make(min(wanted, reach), tenant) if may_write else 0
        if count == 0:
            if pasts:
                self._slots.unpin_unused(prefix, kept)
            else:
                self._slots.unpin(prefix)
            return WriteGrant(0, present, (), stored)
        slots = tuple(self._slots.reserve(count, tenant))
        return self._new_write(
            owner,
            Write(
                keys=tuple(keys[: present + count]),
                asked_index=first,
                first_index=present,
                slots=slots,
                prefix=prefix,
                between_tiers=between_tiers,
                pasts=pasts,
            ),
            stored,
        )

    def reserve_push(
        self, owner: OwnerId, ticket_id: TicketId, keys: Sequence[BlockKey], first: int
    ) -> WriteGrant:
        """Slots of the ticket for ``keys[first:]``; those that are stored already need none."""
        check_keys(keys, first)
        ticket = self._open_ticket_of(owner, ticket_id, for_tail=False)
        if first != len(ticket.blocks):
            raise FrameError(f"blocks from {first} on, but the ticket has {len(ticket.blocks)}")
        wanted = len(keys) - first
        if wanted > len(ticket.reserved):
            raise FrameError(f"{wanted} blocks, but the ticket has {len(ticket.reserved)} left")
        prefix = self._slots.lookup(keys)
        # What others stored counts only where it continues the ticket's own, findable blocks.
        present = prefix[first:] if prefix[:first] == ticket.blocks else []
        self._slots.pin(present)
        if first == 0:  # it may have its prefix from elsewhere, and have claimed nothing
            self._slots.asked(keys, present)
        ticket.blocks += present
        for _ in present:  # each of these needs no slot of the ticket's own
            self._slots.abandon(ticket.reserved.pop())
        slots = tuple(ticket.reserved.popleft() for _ in range(wanted - len(present)))
        self.tickets.grant()
        if not slots:
            return WriteGrant(0, len(keys), (), wanted)
        return self._new_write(
            owner,
            Write(
                keys=tuple(keys),
                asked_index=first,
                first_index=first + len(present),
                slots=slots,
                ticket=ticket,  # which has the prefix pinned
            ),
            len(present),
        )

    def reserve_tail(self, owner: OwnerId, ticket_id: TicketId) -> WriteGrant:
        """A slot of the ticket for the unfinished last block, which has no key. A write of blocks
        with keys may be open beside it."""
        ticket = self._open_ticket_of(owner, ticket_id, for_tail=True)
        if ticket.tail is not None or not ticket.reserved:
            raise FrameError(
                f"a tail block for ticket {ticket_id}, which has "
                + ("one already" if ticket.tail is not None else "no slot left")
            )
        write = Write(slots=(ticket.reserved.popleft(),), ticket=ticket)
        return self._new_write(owner, write, 0)

    def to_fill(
        self, owner: OwnerId, write_id: int, position: int
    ) -> tuple[SlotId, BlockKey | None]:
        """The slot at ``position`` of a write, and the key of its block; a tail has none."""
        write = self._write_of(owner, write_id)
        if not 0 <= position < len(write.slots):
            raise FrameError(f"position {position} of a write of {len(write.slots)}")
        key = None if write.is_tail else write.keys[write.first_index + position]
        return write.slots[position], key

    def filled(self, owner: OwnerId, write_id: int, position: int, checksum: int) -> None:
        """The bytes of one slot have arrived and are what they should be."""
        if not 0 <= checksum < 1 << 64:
            raise FrameError(f"{checksum} is no checksum of 64 bits")
        checksums = self._write_of(owner, write_id).checksums
        if not 0 <= position < len(checksums):
            raise FrameError(f"position {position} of a write of {len(checksums)}")
        checksums[position] = checksum

    def commit(self, owner: OwnerId, write_id: int) -> int:
        """Make what was filled findable. How many of the keys asked for are stored now.

        Raises:
            TicketGone: the write was for a ticket that has been aborted; nothing is kept.
        """
        write = self._write_of(owner, write_id)
        if None in write.checksums:
            raise FrameError(f"commit of write {write_id}, of which not every slot is filled")
        del self._owners[owner].writes[write_id]
        try:
            return commit_write(self._slots, write)
        finally:
            self.tickets.grant()

    def abandon(self, owner: OwnerId, write_id: int) -> None:
        """The owner touches the write's slots no more. Idempotent."""
        write = self._owners[owner].writes.pop(write_id, None)
        if write is not None:
            drop_write(self._slots, write)
            self.tickets.grant()

    # ── tickets ──────────────────────────────────────────────────────────────────────────────

    def open_ticket(
        self,
        owner: OwnerId,
        ticket_id: TicketId,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        deadline_ns: int,
        tenant: str = "",
    ) -> bool:
        """Whether the ticket is open now; if not it waits until it is granted or expires.

        Tickets of the request's earlier attempts end.

        Raises:
            OutOfBlocks: it can never fit.
            CapacityError: too many tickets.
        """
        if block_count < 1:
            raise FrameError(f"a ticket for {block_count} blocks")
        self.tickets.end_attempts(request, attempt - 1)
        return self.tickets.open(
            Ticket(
                ticket=ticket_id,
                request=request,
                attempt=attempt,
                writer=owner,
                reader=reader or ANYBODY,
                block_count=block_count,
                deadline_ns=deadline_ns,
                tenant=tenant,
            )
        )

    def seal(self, owner: OwnerId, ticket_id: TicketId) -> None:
        """Everything is written: the ticket is the reader's from now on.

        Raises:
            TicketGone: it was aborted, or no connection of its reader exists.
        """
        ticket = self._open_ticket_of(owner, ticket_id)
        if ticket.reader != ANYBODY and not self._is_connected(ticket.reader):
            self.tickets.end(ticket)
            self.tickets.grant()
            raise TicketGone(f"the reader {ticket.reader} of ticket {ticket_id} is not connected")
        self.tickets.seal(ticket)
        self.tickets.grant()

    def abort(self, ticket_id: TicketId) -> None:
        """By whoever knows the ticket: writer, reader or a cancellation. Idempotent."""
        ticket = self.tickets.find(ticket_id)
        if ticket is not None:
            self.tickets.end(ticket)
            self.tickets.grant()

    def abort_attempts(self, reader: OwnerId, request: RequestId, attempt: int | None) -> None:
        """End what was opened for this reader on behalf of a request. Idempotent."""
        self.tickets.end_attempts(request, attempt, reader=self._owners[reader].name)
        self.tickets.grant()

    def adopt(self, owner: OwnerId, ticket_id: TicketId) -> ClaimGrant:
        """Turn a sealed ticket into a claim of its reader.

        Raises:
            TicketGone: there is no such ticket, or it is not this reader's.
        """
        ticket = self.tickets.find(ticket_id)
        if ticket is None:
            raise TicketGone(f"ticket {ticket_id} was aborted, adopted before, or lost its owner")
        name = self._owners[owner].name
        if ticket.reader not in (ANYBODY, name):
            raise TicketGone(f"ticket {ticket_id} is for {ticket.reader}, not for {name}")
        if ticket.state is not TicketState.SEALED:
            raise TicketGone(f"ticket {ticket_id} is {ticket.state}, it can be adopted once sealed")
        refuse_if_full(len(self._owners[owner].claims), CLAIMS_MAX, "claims")
        slots = self.tickets.adopt(ticket)
        return self._new_claim(owner, slots, has_tail=ticket.tail is not None)

    # ── what others want to know ─────────────────────────────────────────────────────────────

    def changes(self, after: int) -> StoreChanges:
        return self.contents.changes(after)

    def lower_tier_changed(self, keys: Iterable[BlockKey], *, has_them: bool) -> None:
        """These are below from now on, or not any more; news where the arena lacks them."""
        for key in keys:
            if self._slots.find(key) is None:
                self._feed.note(key, has_them)

    def keys_of(self, owner: OwnerId, write_id: int) -> tuple[BlockKey, ...]:
        """Of the chain that an open write goes on; none of a tail."""
        return self._write_of(owner, write_id).keys

    def take_evicted(self) -> list[Evicted]:
        """Blocks that left the arena since the last call; for who keeps them elsewhere."""
        return self._slots.take_evicted()

    def take_changed_slots(self) -> dict[SlotId, Slot]:
        """Slots whose header in the arena is out of date."""
        return {slot: self._slots[slot] for slot in sorted(self._slots.take_changed())}

    def stat(self, asker: OwnerId | None = None) -> StoreStat:
        """Linear in the arena."""
        self.room.look()
        return stat_of(self, None if asker is None else self._owners[asker].name)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _is_connected(self, name: str) -> bool:
        return any(owner.name == name for owner in self._owners.values())

    def _let_go_of_condemned(self) -> None:
        self.pins.drop_condemned()
        self.tickets.grant()

    def _slot_of(self, owner: OwnerId, claim: int, index: int) -> SlotId:
        slots = self._owners[owner].claims.get(claim, [])
        if not 0 <= index < len(slots):
            raise FrameError(f"block {index} of claim {claim}, which has {len(slots)}")
        return slots[index]

    def _new_claim(self, owner: OwnerId, slots: list[SlotId], *, has_tail: bool) -> ClaimGrant:
        if not slots:
            return ClaimGrant(0, (), (), has_tail=False)
        claim = self._new_id()
        self._owners[owner].claims[claim] = slots
        return ClaimGrant(claim, tuple(slots), self._slots.generations(slots), has_tail)

    def _new_write(self, owner: OwnerId, write: Write, stored_count: int) -> WriteGrant:
        write_id = self._new_id()
        self._owners[owner].writes[write_id] = write
        return WriteGrant(write_id, write.first_index, write.slots, stored_count)

    def _write_of(self, owner: OwnerId, write_id: int) -> Write:
        write = self._owners[owner].writes.get(write_id)
        if write is None:
            raise FrameError(f"write {write_id} is not open")
        return write

    def _open_ticket_of(
        self, owner: OwnerId, ticket_id: TicketId, *, for_tail: bool | None = None
    ) -> Ticket:
        """``for_tail``: of which kind no write may be open; None: of either."""
        ticket = self.tickets.find(ticket_id)
        if ticket is None:
            raise TicketGone(f"ticket {ticket_id} was aborted, or lost its reader")
        if ticket.writer != owner or ticket.state is not TicketState.OPEN:
            raise TicketGone(f"ticket {ticket_id} is {ticket.state}, and not this writer's")
        open_writes = (w for w in self._owners[owner].writes.values() if w.ticket is ticket)
        if any(for_tail in (None, write.is_tail) for write in open_writes):
            raise FrameError(f"ticket {ticket_id} has a write that is neither committed nor over")
        return ticket

    def check(self) -> None:
        """Assert the invariants. Linear in the arena; for tests."""
        self._slots.check()
        self.tickets.check()
        self.pins.check()
        wrong = list(misfits(self))
        assert not wrong, wrong
