"""Pins without a round trip: hazard pointers (Michael 2004) in memory shared with the node.

Each connection has a *board*: an array of slots that its client, and nobody else, writes, and the
node reads. Whoever wants to read a slot
    writes it on its board,   then reads its mark (``shared_index``);
and the node, before it reuses a slot,
    clears the slot's mark,   then reads all boards.
One of the two sees the other, provided that neither's load overtakes its own store. For the node,
which is the one that can wait, the ``fence`` sees to both: ``membarrier`` makes every core that
runs a registered process complete its stores, so that pinning costs the reader two plain stores.

An entry protects its slot in whatever generation: it may be stale, which costs a little room and
nothing else. A process that is stopped keeps what is on its board; when it ends, its connection
ends, and the node forgets the board.
"""

import ctypes
import fcntl
import mmap
import os
import platform
from bisect import insort
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import StoreUnavailable
from pdserve.ids import SlotId

PINS_MAX = 16_384
"""Of one connection, and not more than ``ARENA_SHARE`` of the arena: what does not fit is claimed
by asking the node. A prompt of 250,000 tokens in blocks of 16."""

ARENA_SHARE = 0.5
"""So that a reader that is stopped leaves room for others."""

ORDERED = platform.machine() in ("x86_64", "AMD64")
"""Whether this processor keeps the order of stores and of loads among themselves. Elsewhere readers
would need loads with acquire, which Python has not, and ask the node instead."""

_HEADER_BYTES = 64
_ENTRY_BYTES = 4
_CHANGES, _USED = 0, 1  # places in the header

_SYS_MEMBARRIER = 324  # on x86-64
_QUERY, _GLOBAL_EXPEDITED, _REGISTER_GLOBAL_EXPEDITED = 0, 1 << 1, 1 << 2


def pins_max(slot_count: int) -> int:
    """How many slots one connection may have on its board; 0 where the arena is too small."""
    return min(PINS_MAX, int(slot_count * ARENA_SHARE))


# ── the fence ────────────────────────────────────────────────────────────────────────────────────


def can_fence() -> bool:
    """Whether this kernel lets this process fence, and be fenced by, all that are registered."""
    if not ORDERED:
        return False
    needed = _GLOBAL_EXPEDITED | _REGISTER_GLOBAL_EXPEDITED
    offered = _membarrier(_QUERY)
    return offered >= 0 and offered & needed == needed


def register() -> bool:
    """Let fences of other processes reach this one, from now on. False where that cannot be."""
    return can_fence() and _membarrier(_REGISTER_GLOBAL_EXPEDITED) == 0


def fence() -> bool:
    """Whether all stores that registered processes made until now are visible here."""
    return _membarrier(_GLOBAL_EXPEDITED) == 0


def _membarrier(command: int) -> int:
    """What the system call returns; -1 when it is missing or forbidden."""
    return cast(int, _LIBC.syscall(_SYS_MEMBARRIER, command, 0, 0))


_LIBC = ctypes.CDLL(None)


# ── boards ───────────────────────────────────────────────────────────────────────────────────────


class NodeBoard:
    """A board as the node sees it. Its memory has a descriptor, and no name."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        size = _HEADER_BYTES + capacity * _ENTRY_BYTES
        self.descriptor = os.memfd_create("pins", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        """To be sent to the client, and closed by who does that."""

        try:
            os.ftruncate(self.descriptor, size)
            # Or its client could make it shorter, and end the node by that.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            mapped = mmap.mmap(self.descriptor, size, prot=mmap.PROT_READ)
        except OSError:
            os.close(self.descriptor)
            raise
        self._header, self._entries = _arrays(mapped)
        self._seen_changes = 0

    def has_changed(self) -> bool:
        """Since the last call, as far as it can be seen without a fence."""
        before, self._seen_changes = self._seen_changes, int(self._header[_CHANGES])
        return before != self._seen_changes

    def held(self) -> NDArray[np.uint32]:
        """The slots on it, and 0xFFFFFFFF for empty places. What its client writes is not trusted:
        it may be anything."""
        used = min(int(self._header[_USED]), len(self._entries))
        return self._entries[:used] - np.uint32(1)


@dataclass(slots=True)
class Run:
    """Neighbouring places on a board."""

    start: int
    count: int


class ReaderBoard:
    """A board as its client sees it; for one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        if size <= _HEADER_BYTES:
            raise StoreUnavailable(f"the node lends a board for pins of {size} bytes")
        self._header, self._entries = _arrays(mmap.mmap(descriptor, size))
        self._runs: list[tuple[int, int]] = []  # (start, end) of what is taken, in order

    def pin(self, slots: NDArray[np.uint32]) -> Run | None:
        """Write ``slots`` on the board; None when it has no such room."""
        start = self._room_for(len(slots))
        if start is None:
            return None
        end = start + len(slots)
        # The node reads as far as this says; so it comes first, and never goes back.
        self._header[_USED] = max(end, int(self._header[_USED]))
        np.add(slots, np.uint32(1), out=self._entries[start:end])
        self._header[_CHANGES] += 1
        insort(self._runs, (start, end))
        return Run(start, len(slots))

    def unpin(self, run: Run) -> None:
        """Idempotent."""
        if run.count == 0:
            return
        end = run.start + run.count
        self._entries[run.start : end] = 0
        self._header[_CHANGES] += 1
        self._runs.remove((run.start, end))
        run.count = 0

    def _room_for(self, count: int) -> int | None:
        """The first gap between runs that is large enough."""
        start = 0
        for taken, end in self._runs:
            if taken - start >= count:
                return start
            start = end
        return start if len(self._entries) - start >= count else None


class Boards:
    """All boards of a node, by connection."""

    def __init__(self, slot_count: int) -> None:
        self._slot_count = slot_count
        self._boards: dict[int, NodeBoard] = {}
        self._on_board = np.zeros(slot_count, np.bool_)  # all False between two calls

    def __len__(self) -> int:
        return len(self._boards)

    def open(self, connection: int) -> NodeBoard:
        """Raises OSError when this process has too many files open."""
        board = self._boards[connection] = NodeBoard(pins_max(self._slot_count))
        return board

    def close(self, connection: int) -> None:
        """Its client is gone, and touches nothing any more."""
        self._boards.pop(connection, None)

    def held_of(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        """Those of ``slots`` that are on a board."""
        held = [self._slots_on(board) for board in self._boards.values()]
        for each in held:
            self._on_board[each] = True
        found = {slot for slot in slots if self._on_board[slot]}
        for each in held:
            self._on_board[each] = False
        return found

    def changed(self) -> Iterator[tuple[int, list[SlotId]]]:
        """Connections whose boards have changed since the last call, and what is on them now."""
        for connection, board in self._boards.items():
            if board.has_changed():
                yield connection, self._slots_on(board).tolist()

    def _slots_on(self, board: NodeBoard) -> NDArray[np.uint32]:
        held = board.held()
        return held[held < self._slot_count]


def _arrays(mapped: mmap.mmap) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    header = np.frombuffer(mapped, np.uint64, _HEADER_BYTES // 8)
    return header, np.frombuffer(mapped, np.uint32, offset=_HEADER_BYTES)
