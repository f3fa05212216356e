"""A node takes its predecessor's arena over, if there is one that it can use.

``inheritance`` has what becomes of the slots. What the dead node's clients still read and write is
theirs until they are gone (``arena_users``): until then no block that was taken over is evicted,
and no slot that was in anybody's hands is reused; slots that were free can be written at once.
Clients of the dead node find out at their next call, and connect anew; a client that has dropped
its old connection and the views that it had from it is gone in this sense, its process need not be.
"""

import logging
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pdserve.errors import StoreUnavailable
from pdserve.ids import SlotId, StoreId
from pdserve.kvstore import arena_users
from pdserve.kvstore.arena import Arena, Geometry, create_arena, superblock_of
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.inheritance import Inheritance, inherit
from pdserve.kvstore.superblock import Superblock, read_superblock, write_epoch

_log = logging.getLogger(__name__)


class Predecessors:
    """The clients of an arena's earlier nodes, and the slots that were in their hands."""

    def __init__(self, path: Path, epoch: int, slots: Collection[SlotId]) -> None:
        self._path = path
        self._epoch = epoch
        self._slots = frozenset(slots)
        self._are_there = epoch > 1

    def are_there(self) -> bool:
        """A system call while they are; once they are gone they do not come back."""
        if self._are_there:
            self._are_there = arena_users.is_used_before(self._path, self._epoch)
        return self._are_there

    def held_of(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        """Those of ``slots`` that they may still touch."""
        return self._slots.intersection(slots) if self._slots and self.are_there() else ()

    def when_gone(self, tell: Callable[[], None]) -> None:
        """Calls ``tell`` from a thread of its own, which no end of the process waits for."""

        def wait() -> None:
            try:
                arena_users.wait_until_unused_before(self._path, self._epoch)
            except OSError as error:  # the arena is gone, and this node with it
                _log.info("nobody waits for the arena's earlier users any more: %s", error)
            else:
                tell()

        threading.Thread(target=wait, name="predecessors", daemon=True).start()


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a node begins with. ``inheritance`` is None when the arena is new."""

    arena: Arena
    predecessors: Predecessors
    inheritance: Inheritance | None = None


def begin(path: Path, geometry: Geometry, store_id: StoreId, *, codec: PayloadCodec) -> Beginning:
    """Take over the arena at ``path``, or make a new one there.

    Raises:
        ConfigError: the file system has less room than a new one will need.
    """
    begun = _take_over(path, superblock_of(geometry, store_id, codec))
    if begun is not None:
        return begun
    path.unlink(missing_ok=True)  # who has mapped it keeps it
    arena = create_arena(path, geometry, store_id, codec=codec)
    return Beginning(arena, Predecessors(path, arena.epoch, ()))


def _take_over(path: Path, expected: Superblock) -> Beginning | None:
    """None, said in the log, when there is none that can be used."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        found = read_superblock(descriptor, expected.store_id)
        if reason := found.differences(expected) or _refusal(descriptor, found):
            raise StoreUnavailable(reason)
        epoch = found.epoch + 1
        write_epoch(descriptor, epoch)  # before anybody is looked for, see ``arena_users``
        arena = Arena.of(descriptor, found, epoch=epoch, writable=True)
    except StoreUnavailable as error:
        _log.warning("the arena at %s is made anew: %s", path, error)
        return None
    finally:
        os.close(descriptor)
    inheritance = inherit(arena.headers())
    predecessors = Predecessors(path, epoch, inheritance.draining_slots)
    inheritance = replace(inheritance, held=predecessors.are_there())
    _log.info(
        "took over %d blocks of the arena at %s%s",
        inheritance.adopted_count,
        path,
        ", which its earlier users still have" if inheritance.held else "",
    )
    return Beginning(arena, predecessors, inheritance)


def _refusal(descriptor: int, found: Superblock) -> str:
    size, needed = os.fstat(descriptor).st_size, Arena.file_bytes_of(found)
    if found.epoch == 0:
        return "nobody can tell who still uses it"
    return f"it has {size} bytes of {needed}" if size < needed else ""
