"""The node's side of reading without asking: what it lends to clients on its host.

Lent are descriptors, over the Unix socket and with the answer to the greeting: the arena and the
index, opened so that they can only be read, and a board for pins of the connection's own. A mapping
made from the first two cannot be made writable by mistake. Where the kernel has no ``membarrier``
for us, only the arena is lent, and clients ask for their pins.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from pdserve.ids import SlotId
from pdserve.kvstore import hazards
from pdserve.kvstore.adoption import Predecessors
from pdserve.kvstore.arena import lend_arena
from pdserve.kvstore.hazards import Boards
from pdserve.kvstore.shared_index import SharedIndex, create_index
from pdserve.kvstore.slot_states import Slot

_log = logging.getLogger(__name__)

INDEX_NAME = "index"

ARENA, INDEX, PINS = "arena", "index", "pins"
"""What a descriptor is of."""


class Lending:
    """``readers.Readers`` over shared memory."""

    def __init__(
        self,
        arena: Path,
        slot_count: int,
        *,
        epoch: int = 0,
        predecessors: Predecessors | None = None,
        can_fence: Callable[[], bool] = hazards.can_fence,
        fence: Callable[[], bool] = hazards.fence,
    ) -> None:
        """Makes an index beside the arena, which exists. ``epoch``: of this node."""
        path = arena.with_name(INDEX_NAME)
        self._index: SharedIndex = create_index(path, slot_count)
        self._readable = {ARENA: lend_arena(arena, epoch), INDEX: _open_readable(path)}
        self._predecessors = predecessors
        self._boards = Boards(slot_count)
        self._lends_pins = hazards.pins_max(slot_count) > 0 and can_fence()
        self._fence = fence

    def close(self) -> None:
        for descriptor in self._readable.values():
            os.close(descriptor)

    @contextlib.contextmanager
    def lend(self, connection: int, *, pins: bool) -> Iterator[dict[str, int]]:
        """Descriptors for a client on this host, by name, to be sent meanwhile.

        ``pins``: the client is able to pin by itself.
        """
        if not (pins and self._lends_pins):
            yield {ARENA: self._readable[ARENA]}
            return
        try:
            board = self._boards.open(connection)
        except OSError as error:
            _log.warning("connection %d has to ask for its pins: %s", connection, error.strerror)
            yield {ARENA: self._readable[ARENA]}
            return
        try:
            yield {**self._readable, PINS: board.descriptor}
        finally:
            os.close(board.descriptor)

    def end(self, connection: int) -> None:
        """It is closed: its process can touch nothing any more, or said that it will not."""
        self._boards.close(connection)

    def note(self, slot: SlotId, record: Slot) -> None:
        """What ``slot`` is now; its header says so already."""
        self._index.note(slot, record)

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        self._index.hide(slots)
        inherited = () if self._predecessors is None else self._predecessors.held_of(slots)
        if not len(self._boards):
            return inherited
        # Without the fence a pin might be on its way here: then all of them may be held.
        held = self._boards.held_of(slots) if self._fence() else set(slots)
        return {*held, *inherited} if inherited else held

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return self._boards.changed()


def _open_readable(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
