"""What actors write while they live, in memory that survives them.

One row of numbers and a short ring of events per actor, in a mapping that all forks share. A call
under way stands in its row with its limit, so a call that never returns is seen from outside.
"""

import mmap
import time
from enum import IntEnum

import numpy as np

from pdserve.clock import MS, S

EVENTS_KEPT = 24
EVENT_BYTES = 120


class Number(IntEnum):
    """Columns of an actor's row; all but the last few are totals over its incarnations."""

    GETS = 0  # blocks read, every byte compared
    MISSES = 1  # blocks asked for and not stored
    PUTS = 2  # blocks said to be stored
    ADOPTED = 3  # hand-offs that arrived, every byte compared
    ABORTED = 4  # hand-offs given up, by either side
    LOST = 5  # hand-offs that ended with somebody's death
    REFUSED = 6  # typed errors that say "not now"
    GONE = 7  # calls that found their node gone
    DRILLS = 8  # fencing drills
    LOCAL = 9  # claims that a reader has pinned by itself
    VIEWS = 10  # of the gets, those of bytes where they lie
    LOCATED = 11  # answers of a master that named a node
    EVENT_COUNT = 12
    QUIET = 13  # 1: holds nothing, waits for the next phase
    CALL_BEGAN_NS = 14  # 0: no call under way
    CALL_LIMIT_NS = 15


TOTALS = tuple(Number)[: Number.EVENT_COUNT]


class Board:
    """``phase`` is the stage's to set; an actor writes its own row only."""

    RUN, QUIET, END = range(3)

    def __init__(self, actors_max: int) -> None:
        columns = len(Number)
        rows_bytes = 8 * columns * (actors_max + 1)
        self._map = mmap.mmap(-1, rows_bytes + actors_max * EVENTS_KEPT * EVENT_BYTES)
        self._rows = np.frombuffer(self._map, np.int64, columns * (actors_max + 1)).reshape(
            actors_max + 1, columns
        )
        self._phase = self._rows[actors_max]
        self._events_at = rows_bytes

    @property
    def phase(self) -> int:
        return int(self._phase[0])

    @phase.setter
    def phase(self, phase: int) -> None:
        self._phase[0] = phase

    def begin_incarnation(self, actor: int) -> None:
        self._rows[actor, Number.QUIET :] = 0

    def add(self, actor: int, number: Number, count: int = 1) -> None:
        self._rows[actor, number] += count

    def put(self, actor: int, number: Number, value: int) -> None:
        self._rows[actor, number] = value

    def get(self, actor: int, number: Number) -> int:
        return int(self._rows[actor, number])

    def total(self, number: Number) -> int:
        return int(self._rows[:-1, number].sum())

    def overdue_ms(self, actor: int) -> int:
        """How long the call under way has been beyond its limit; 0 or less when it is not."""
        began_ns = self.get(actor, Number.CALL_BEGAN_NS)
        if began_ns == 0:
            return 0
        return (time.monotonic_ns() - began_ns - self.get(actor, Number.CALL_LIMIT_NS)) // MS

    def note(self, actor: int, text: str) -> None:
        """Remember an event of an actor; the last ``EVENTS_KEPT`` stay."""
        count = self.get(actor, Number.EVENT_COUNT)
        stamp = f"{time.monotonic_ns() / S:.4f} {text}".encode()[:EVENT_BYTES].ljust(EVENT_BYTES)
        start = self._event_at(actor, count)
        self._map[start : start + EVENT_BYTES] = stamp
        self._rows[actor, Number.EVENT_COUNT] = count + 1

    def events(self, actor: int) -> list[str]:
        """The last ones, oldest first."""
        count = self.get(actor, Number.EVENT_COUNT)
        starts = [self._event_at(actor, each) for each in range(max(0, count - EVENTS_KEPT), count)]
        return [
            self._map[start : start + EVENT_BYTES].decode(errors="replace").strip()
            for start in starts
        ]

    def _event_at(self, actor: int, count: int) -> int:
        return self._events_at + (actor * EVENTS_KEPT + count % EVENTS_KEPT) * EVENT_BYTES
