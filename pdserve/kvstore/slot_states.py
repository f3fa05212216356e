"""The life of a slot: one block's place in an arena.

    FREE ──RESERVE──> RESERVED ──PUBLISH──> COMMITTED ──CONDEMN──> QUARANTINED
     ^                   │                      │                      ^
     ├──FREE─────────────┴──KEEP──> PRIVATE <───┘ DETACH               │
     │                                └───────────────── CONDEMN ──────┘
     └──FREE── DRAINING <──DRAIN── each of the last three

RESERVED belongs to one writer; COMMITTED is in the index, and its bytes never change; PRIVATE is
complete too but in no index (a request's unfinished last block, or a block whose parent is gone),
and lives as long as somebody has pinned it; QUARANTINED failed its checksum: nobody finds it again;
DRAINING is found no more either, and becomes free as soon as no reader holds it: those on the
node's host pin blocks by themselves (``readers``), so that is known only when all have been asked.

A node that takes over its predecessor's arena begins with COMMITTED and DRAINING slots, without
events: those were the predecessor's (``adoption``).

Tables keep states as small numbers: a state's place in ``STATES``, an event's in ``EVENTS``.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from pdserve.ids import BlockKey, SlotId


class SlotState(StrEnum):
    FREE = "free"
    RESERVED = "reserved"
    COMMITTED = "committed"
    PRIVATE = "private"
    QUARANTINED = "quarantined"
    DRAINING = "draining"


class SlotEvent(StrEnum):
    RESERVE = "reserve"  # a writer got it
    PUBLISH = "publish"  # written, and in the index from now on
    KEEP = "keep"  # written, for its owner alone
    DETACH = "detach"  # an ancestor was condemned while somebody had this one pinned
    CONDEMN = "condemn"  # its bytes fail their checksum
    DRAIN = "drain"  # nobody finds it from now on, and the node holds it no more
    FREE = "free"  # nobody wants it, and no process may touch it


TRANSITIONS: Mapping[SlotState, Mapping[SlotEvent, SlotState]] = MappingProxyType(
    {
        SlotState.FREE: {SlotEvent.RESERVE: SlotState.RESERVED},
        SlotState.RESERVED: {
            SlotEvent.PUBLISH: SlotState.COMMITTED,
            SlotEvent.KEEP: SlotState.PRIVATE,
            SlotEvent.FREE: SlotState.FREE,
        },
        SlotState.COMMITTED: {
            SlotEvent.DETACH: SlotState.PRIVATE,
            SlotEvent.CONDEMN: SlotState.QUARANTINED,
            SlotEvent.DRAIN: SlotState.DRAINING,
        },
        SlotState.PRIVATE: {
            SlotEvent.CONDEMN: SlotState.QUARANTINED,
            SlotEvent.DRAIN: SlotState.DRAINING,
        },
        SlotState.QUARANTINED: {SlotEvent.DRAIN: SlotState.DRAINING},
        SlotState.DRAINING: {SlotEvent.FREE: SlotState.FREE},
    }
)

STATES = tuple(SlotState)
EVENTS = tuple(SlotEvent)
FREE, RESERVED, COMMITTED, PRIVATE, QUARANTINED, DRAINING = range(len(STATES))
RESERVE, PUBLISH, KEEP, DETACH, CONDEMN, DRAIN, RELEASE = range(len(EVENTS))

REFUSED = -1
FOLLOWING = tuple(
    tuple(
        STATES.index(TRANSITIONS[state][event]) if event in TRANSITIONS[state] else REFUSED
        for event in EVENTS
    )
    for state in STATES
)
"""``TRANSITIONS`` in numbers: by state, then by event."""

PINNABLE = frozenset((SlotState.COMMITTED, SlotState.PRIVATE, SlotState.QUARANTINED))


class Slot(NamedTuple):
    """What is known of one slot at one moment."""

    state: SlotState = SlotState.FREE
    generation: int = 0
    key: BlockKey | None = None
    checksum: int = 0
    parent: SlotId | None = None
    depth: int = 0  # of the block in its chain, from 0
    children: int = 0
    pins: int = 0
    last_use: int = 0  # the table's own count of uses; no clock
    turn: int = 0  # of the conversation that used it last


class Past(NamedTuple):
    """What an order of eviction knows of a block."""

    last_use: int
    turn: int


class Evicted(NamedTuple):
    """A block that has just left its slot; its bytes are there until somebody writes."""

    slot: SlotId
    key: BlockKey
    checksum: int
