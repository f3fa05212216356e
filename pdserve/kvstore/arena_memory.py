"""The memory behind an arena's file, which its node takes piece by piece, beside serving.

A page that has no memory yet gets some when it is touched first; where none is left by then, that
ends the process that touched it. So no slot is lent before its memory is there.
"""

from collections.abc import Sequence
from pathlib import Path

from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import SlotId
from pdserve.kvstore.arena import ALLOCATED_BYTES, Geometry, allocate


class ArenaMemory:
    def __init__(self, path: Path, geometry: Geometry) -> None:
        """That of the headers is there from now on: the node itself writes them.

        Raises:
            ConfigError: there is no memory left for them.
        """
        self._path = path
        self._geometry = geometry
        self._taken_bytes = 0  # of the file, from its beginning on
        self._take(geometry.payload_offset)

    @property
    def is_whole(self) -> bool:
        return self._taken_bytes >= self._geometry.file_bytes

    def take_piece(self) -> None:
        """The next ``ALLOCATED_BYTES``, in about 10 ms; for a thread.

        Raises:
            ConfigError: there is no memory left for it.
        """
        self._take(ALLOCATED_BYTES)

    def secure(self, slots: Sequence[SlotId]) -> None:
        """The memory of these slots is there when this returns; nearly always it was before.

        Raises:
            StoreUnavailable: there is none left, and the node is about to end for that.
        """
        stride_bytes = self._geometry.stride_bytes
        try:
            for slot in slots:
                start = self._geometry.payload_offset + slot * stride_bytes
                if start + stride_bytes > self._taken_bytes:
                    allocate(self._path, start, stride_bytes)
        except OSError as error:
            raise StoreUnavailable(
                f"the store node has no memory for a block: {error.strerror}; lower "
                "store.arena_bytes, or give the machine or container more shared memory"
            ) from error

    def _take(self, count: int) -> None:
        try:
            self._taken_bytes = allocate(self._path, self._taken_bytes, count)
        except OSError as error:
            raise ConfigError(
                f"no memory for the arena beyond {self._taken_bytes} of "
                f"{self._geometry.file_bytes} bytes: {error.strerror}; lower store.arena_bytes"
            ) from error
