"""What a store node answers: plain values, made by the core and sent as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.ids import BlockKey, SlotId


@dataclass(frozen=True, slots=True)
class ClaimGrant:
    """A pinned prefix. ``claim`` is 0 when the node has nothing to release: the prefix is empty, or
    the client has pinned it itself."""

    claim: int
    slots: tuple[SlotId, ...]
    generations: tuple[int, ...]
    has_tail: bool  # the last slot is a ticket's unfinished block


@dataclass(frozen=True, slots=True)
class WriteGrant:
    """Slots to fill. ``write`` is 0 when there is none: ``stored_count`` is final then.

    Slot i is for key ``first_index`` + i; keys before that are stored already.
    """

    write: int
    first_index: int
    slots: tuple[SlotId, ...]
    stored_count: int  # of the keys asked for


@dataclass(frozen=True, slots=True)
class PrefixQuote:
    """What a node has of a prefix, and what the part that is not in its arena would take."""

    in_arena: int  # leading blocks
    stored: int  # leading blocks, with those on the disk
    fetch_fixed_s: float  # before the first of them is there: those in line before included
    fetch_bytes_per_s: float  # 0.0 where there is no disk


@dataclass(frozen=True, slots=True)
class StoreChanges:
    """What became of the index since the sequence number that was asked for."""

    sequence: int  # ask for what comes after this one next time
    added: tuple[BlockKey, ...]  # parents before children
    removed: tuple[BlockKey, ...]
    complete: bool  # False: forget everything; ``added`` is all there is


@dataclass(frozen=True, slots=True)
class StoreStat:
    """What a node holds at this moment, and totals since its start."""

    slots_total: int
    slots_free: int
    slots_available: int  # free, or cached and evictable
    slots_reserved: int
    slots_committed: int
    slots_private: int
    slots_quarantined: int
    slots_draining: int  # found no more, but a reader still holds them
    slots_pinned: int
    claims: int
    writes: int
    tickets: int  # those in the queue included
    tickets_queued: int
    tickets_own: int  # that end with a connection of the asker's name
    connections: int
    evicted_count: int
    condemned_count: int
    ssd: Mapping[str, int] = field(default_factory=dict)
    """Of the tier below: ``blocks`` that are there now, and totals; empty where there is none."""

    def counters(self) -> dict[str, int]:
        """What an operator wants to see beside a worker's own figures."""
        return {
            "store_slots": self.slots_total,
            "store_free": self.slots_available,
            "store_committed": self.slots_committed,
            "store_reserved": self.slots_reserved,
            "store_pinned": self.slots_pinned,
            "store_tickets": self.tickets,
            "store_evicted": self.evicted_count,
            **{f"store_ssd_{name}": count for name, count in self.ssd.items()},
        }
