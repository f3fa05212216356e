"""A ticket: one request's blocks on their way from the worker that writes them to its reader.

    QUEUED ──GRANTED──> OPEN ──SEALED──> SEALED ──ADOPTED──> (gone)
      └───────────┬───────┴────────────────┘ ENDED ──────> (gone)

QUEUED waits for slots, first come first served, all or nothing: two hand-offs that each hold half
of what they need would wait for ever. OPEN and QUEUED belong to the writer's connection; SEALED
belongs to the reader, named by ``reader``. ENDED is an abort, a deadline in the queue, or the death
of whom it belongs to.

``ANYBODY`` as the reader: whoever adopts it first; until then it stays the writer's.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NewType

from pdserve.errors import CapacityError, IllegalTransition, OutOfBlocks
from pdserve.ids import RequestId, SlotId, TicketId
from pdserve.kvstore.readers import Room
from pdserve.kvstore.slots import SlotTable

OwnerId = NewType("OwnerId", int)
"""One client connection of one store node."""

ANYBODY = "*"

TICKETS_MAX = 4096
"""Tickets of a node, those that wait included."""

RETRY_AFTER_MS = 50


class TicketState(StrEnum):
    QUEUED = "queued"
    OPEN = "open"
    SEALED = "sealed"
    GONE = "gone"


class TicketEvent(StrEnum):
    GRANTED = "granted"  # its slots are reserved
    SEALED = "sealed"  # everything is written
    ADOPTED = "adopted"  # the reader holds the blocks as an ordinary claim
    ENDED = "ended"


TRANSITIONS: Mapping[TicketState, Mapping[TicketEvent, TicketState]] = MappingProxyType(
    {
        TicketState.QUEUED: {
            TicketEvent.GRANTED: TicketState.OPEN,
            TicketEvent.ENDED: TicketState.GONE,
        },
        TicketState.OPEN: {
            TicketEvent.SEALED: TicketState.SEALED,
            TicketEvent.ENDED: TicketState.GONE,
        },
        TicketState.SEALED: {
            TicketEvent.ADOPTED: TicketState.GONE,
            TicketEvent.ENDED: TicketState.GONE,
        },
        TicketState.GONE: {},
    }
)


@dataclass(slots=True, kw_only=True)
class Ticket:
    ticket: TicketId
    request: RequestId
    attempt: int
    writer: OwnerId
    reader: str
    block_count: int  # reserved when granted
    deadline_ns: int  # of the wait in the queue
    tenant: str = ""
    state: TicketState = TicketState.QUEUED
    reserved: deque[SlotId] = field(default_factory=deque)  # not yet written
    blocks: list[SlotId] = field(default_factory=list)  # complete and pinned, in chain order
    tail: SlotId | None = None  # complete and pinned

    def advance(self, event: TicketEvent) -> None:
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            raise IllegalTransition(f"{event} while ticket {self.ticket} is {self.state}")
        self.state = following

    @property
    def pinned(self) -> list[SlotId]:
        return self.blocks if self.tail is None else [*self.blocks, self.tail]

    @property
    def is_writers(self) -> bool:
        """Whether it ends with its writer's connection; else with its reader's."""
        return self.state is not TicketState.SEALED or self.reader == ANYBODY


class TicketBook:
    """All tickets of a node, and the queue of those that wait for slots.

    Invariant, asserted by ``check``: the first in the queue does not fit. So whoever frees slots
    calls ``grant``.
    """

    def __init__(self, slots: SlotTable, room: Room) -> None:
        self._slots = slots
        self._room = room
        self._tickets: dict[TicketId, Ticket] = {}
        self._queue: deque[Ticket] = deque()
        self._granted: list[TicketId] = []

    def __iter__(self) -> Iterator[Ticket]:
        return iter(list(self._tickets.values()))

    @property
    def count(self) -> int:
        return len(self._tickets)

    @property
    def queued_count(self) -> int:
        return len(self._queue)

    def find(self, ticket_id: TicketId) -> Ticket | None:
        return self._tickets.get(ticket_id)

    def open(self, ticket: Ticket) -> bool:
        """Whether the ticket is open now; if not it waits at the end of the queue.

        Raises:
            OutOfBlocks: it can never fit.
            CapacityError: too many tickets.
        """
        if ticket.block_count > self._slots.slot_count:
            raise OutOfBlocks(
                ticket.block_count, self._slots.slot_count, retry_after_ms=RETRY_AFTER_MS
            )
        if len(self._tickets) >= TICKETS_MAX:
            raise CapacityError(
                f"{TICKETS_MAX} tickets are under way, which is the limit; wait for some to end",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._tickets[ticket.ticket] = ticket
        self._queue.append(ticket)
        self.grant()
        if ticket.state is not TicketState.OPEN:
            return False
        self._granted.remove(ticket.ticket)  # the caller learns it from the result
        return True

    def grant(self) -> None:
        """Open as many waiting tickets as fit, in order."""
        while self._queue and self._room.has(self._queue[0].block_count, self._queue[0].tenant):
            ticket = self._queue.popleft()
            ticket.reserved.extend(self._slots.reserve(ticket.block_count, ticket.tenant))
            ticket.advance(TicketEvent.GRANTED)
            self._granted.append(ticket.ticket)

    def take_granted(self) -> list[TicketId]:
        """Tickets that waited and are open now, since the last call."""
        granted, self._granted = self._granted, []
        return granted

    def seal(self, ticket: Ticket) -> None:
        """What it did not use of its slots becomes free."""
        ticket.advance(TicketEvent.SEALED)
        self._free_reserved(ticket)

    def adopt(self, ticket: Ticket) -> list[SlotId]:
        """Its blocks; their pins are the caller's from now on."""
        ticket.advance(TicketEvent.ADOPTED)
        del self._tickets[ticket.ticket]
        return ticket.pinned

    def end(self, ticket: Ticket) -> None:
        if ticket.state is TicketState.QUEUED:
            self._queue.remove(ticket)
        ticket.advance(TicketEvent.ENDED)
        del self._tickets[ticket.ticket]
        self._free_reserved(ticket)
        self._slots.unpin(ticket.pinned)

    def end_attempts(
        self, request: RequestId, attempt: int | None, *, reader: str | None = None
    ) -> None:
        """End the request's tickets of ``attempt`` and before it; None stands for any."""
        for ticket in self:
            if (
                ticket.request == request
                and (attempt is None or ticket.attempt <= attempt)
                and reader in (None, ticket.reader)
            ):
                self.end(ticket)

    def expire(self, now_ns: int) -> list[tuple[TicketId, OutOfBlocks]]:
        """End the waiting tickets whose time is up, and say what they wanted."""
        expired = []
        for ticket in [each for each in self._queue if each.deadline_ns <= now_ns]:
            available = self._slots.available_count
            error = OutOfBlocks(ticket.block_count, available, retry_after_ms=RETRY_AFTER_MS)
            self.end(ticket)
            expired.append((ticket.ticket, error))
        self.grant()
        return expired

    def next_deadline_ns(self) -> int | None:
        if not self._queue:  # as after nearly every event
            return None
        return min(ticket.deadline_ns for ticket in self._queue)

    def _free_reserved(self, ticket: Ticket) -> None:
        while ticket.reserved:
            self._slots.abandon(ticket.reserved.pop())

    def check(self) -> None:
        """Assert the invariant, and that state and queue agree."""
        if self._queue:
            assert self._queue[0].block_count > self._slots.available_count, "waits in vain"
        queued = [t for t in self._tickets.values() if t.state is TicketState.QUEUED]
        assert queued == list(self._queue)
