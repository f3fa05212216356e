"""A write: slots that one owner fills, and what becomes of them when it says that it is done.

Commit is where blocks become visible, parents before children. What was stored by somebody else in
the meantime is used instead of the own copy. What has lost its parent in the meantime (its bytes
were found to be wrong) is of no use to a put, and ends it there; a ticket keeps it, because its
reader gets the blocks by their order and not by their keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from pdserve.errors import CapacityError, FrameError, TicketGone
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId
from pdserve.kvstore.slot_states import Past, SlotState
from pdserve.kvstore.slots import SlotTable
from pdserve.kvstore.tickets import RETRY_AFTER_MS, Ticket, TicketState


@dataclass(slots=True, kw_only=True)
class Write:
    keys: tuple[BlockKey, ...] = ()  # from the chain's first; empty for a tail block
    asked_index: int = 0  # the caller's ``first``
    first_index: int = 0  # of the first key that gets a slot
    slots: tuple[SlotId, ...]
    prefix: list[SlotId] = field(default_factory=list)  # pinned until the commit, so parents stay
    ticket: Ticket | None = None
    checksums: list[int | None] = field(init=False)
    between_tiers: bool = False
    pasts: Sequence[Past] = ()  # of ``keys``, for blocks that come from another node

    def __post_init__(self) -> None:
        self.checksums = [None] * len(self.slots)

    @property
    def is_tail(self) -> bool:
        return not self.keys

    @property
    def filled(self) -> list[int]:
        """The checksums; all of them must be known."""
        known = [checksum for checksum in self.checksums if checksum is not None]
        assert len(known) == len(self.slots), "commit of a write that is not filled"
        return known

    def new_blocks(self) -> Iterator[tuple[BlockKey, SlotId, int]]:
        return zip(self.keys[self.first_index :], self.slots, self.filled, strict=True)


@dataclass(slots=True)
class Owner:
    """What a client connection holds."""

    name: str
    claims: dict[int, list[SlotId]] = field(default_factory=dict)
    writes: dict[int, Write] = field(default_factory=dict)


def refuse_if_full(count: int, count_max: int, what: str) -> None:
    """Raises CapacityError where one connection has as much as it may have."""
    if count >= count_max:
        raise CapacityError(
            f"{count} {what} are held, the limit is {count_max}; release some first",
            retry_after_ms=RETRY_AFTER_MS,
        )


def check_keys(keys: Sequence[BlockKey], first: int) -> None:
    """Raises FrameError unless ``keys[first:]`` can be asked for."""
    if not 0 <= first <= len(keys):
        raise FrameError(f"blocks from {first} on, of {len(keys)}")
    for key in keys:
        if len(key) != BLOCK_KEY_BYTES:
            raise FrameError(f"a block key of {len(key)} bytes, it must have {BLOCK_KEY_BYTES}")


def commit_write(slots: SlotTable, write: Write) -> int:
    """How many of the keys asked for are stored now. Every slot has been filled.

    Raises:
        TicketGone: the write was for a ticket that has been aborted; nothing is kept.
    """
    if write.ticket is None:
        return _commit_put(slots, write)
    if write.ticket.state is not TicketState.OPEN:
        drop_write(slots, write)
        raise TicketGone(f"ticket {write.ticket.ticket} was aborted while its blocks were written")
    if write.is_tail:
        (slot,), (checksum,) = write.slots, write.filled
        slots.keep(slot, None, checksum)
        write.ticket.tail = slot
    else:
        _commit_push(slots, write, write.ticket)
    return len(write.keys) - write.asked_index


def drop_write(slots: SlotTable, write: Write) -> None:
    """Nobody touches its slots any more: back to an open ticket, or free."""
    if write.ticket is not None and write.ticket.state is TicketState.OPEN:
        write.ticket.reserved.extendleft(reversed(write.slots))
    else:
        for slot in write.slots:
            slots.abandon(slot)
    slots.unpin(write.prefix)


def _commit_put(slots: SlotTable, write: Write) -> int:
    chain = list(write.prefix)  # all of it pinned: by the reservation, then by ``_place``
    parent, new_keys = chain[-1] if chain else None, write.keys[write.first_index :]
    if slots.are_new(new_keys, parent):  # as nearly always
        slots.publish_chain(write.slots, new_keys, parent, write.filled)
        chain += write.slots
    else:
        for key, slot, checksum in write.new_blocks():
            placed = _place(slots, key, slot, chain, checksum)
            if placed is None:
                break
            chain.append(placed)
    for slot in write.slots[len(chain) - len(write.prefix) :]:
        slots.abandon(slot)
    stored = takewhile(lambda slot: slots.state(slot) is SlotState.COMMITTED, chain)
    stored_count = sum(1 for _ in stored)
    if not write.between_tiers:
        slots.wrote(write.keys[: len(chain)], chain)
    if write.pasts:
        slots.unpin_unused(chain, _pasts_of(slots, write, chain))
    else:
        slots.unpin(chain)
    return max(0, stored_count - write.asked_index)


def _pasts_of(slots: SlotTable, write: Write, chain: Sequence[SlotId]) -> list[Past]:
    """Of what was there already, the later use counts: here, or where the others come from."""
    own = set(write.slots)
    told = zip(chain, write.pasts, strict=False)  # of the chain there may be less than was asked
    return [past if slot in own else max(past, slots.past(slot)) for slot, past in told]


def _commit_push(slots: SlotTable, write: Write, ticket: Ticket) -> None:
    for key, slot, checksum in write.new_blocks():
        placed = _place(slots, key, slot, ticket.blocks, checksum)
        if placed is None:
            slots.keep(slot, key, checksum)
            placed = slot
        ticket.blocks.append(placed)
    slots.wrote(write.keys, ticket.blocks)


def _place(
    slots: SlotTable, key: BlockKey, slot: SlotId, chain: Sequence[SlotId], checksum: int
) -> SlotId | None:
    """Where block ``key`` is from now on, pinned: in ``slot``, or where it was already.

    None when it could not be found there: its parent, the last of ``chain``, left the index.
    """
    parent = chain[-1] if chain else None
    if parent is not None and slots.state(parent) is not SlotState.COMMITTED:
        return None
    existing = slots.find(key)
    if existing is None:
        slots.publish(slot, key, parent, checksum)
        return slot
    if slots.parent(existing) != parent:
        return None  # only a caller that mixes up its keys gets here
    slots.pin([existing])
    slots.abandon(slot)
    return existing
