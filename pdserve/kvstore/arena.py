"""One store node's shared memory: a file that clients on the same host map.

    superblock   one page: what this is, its geometry, and whose (``superblock``)
    headers      48 bytes per slot (``headers``)
    payloads     one per slot, 64-byte aligned, large ones to pages, from a page border on

The node alone writes headers. A client writes the payload of slots that were reserved for it, and
reads those that it has claimed, through a mapping that cannot write. The file is never made
shorter: whoever has mapped it can read it as long as it lives, whatever became of the node. A
node that follows one that was killed goes on with its file (``adoption``).

A header says which bytes its payload should be: key, generation, and a checksum (XXH3, 64 bits)
over key and payload; and how its numbers are written (``codecs``).
"""

import ctypes
import errno
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId, StoreId
from pdserve.kvstore import arena_users
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.headers import (
    HEADER_BYTES,
    Header,
    HeaderColumns,
    header_columns,
    pack_header,
    unpack_header,
)
from pdserve.kvstore.slot_states import Slot
from pdserve.kvstore.superblock import (
    Superblock,
    boot_id,
    fingerprint,
    read_epoch,
    read_superblock,
    write_epoch,
    write_superblock,
)

SLOTS_MAX = 1 << 18
"""More than the answer to one question about all keys can carry."""

ALIGNMENT_BYTES = 64
PAGED_FROM_BYTES = 64 << 10
"""Slots of so much or more begin at a page border, which costs 3 % at most: a disk can then write
and read them where they are."""

ALLOCATED_BYTES = 32 << 20
"""Memory asked for in one piece: about 10 ms, after which a node that ends can notice it."""

TOUCHED_BYTES = 4 << 20
"""Touched in one piece: 0.3 ms where the pages have been cleared, 1 to 10 ms where not."""

PIECE_BYTES = 512 << 10
"""Copied and hashed in one go: the copy is in the second-level cache still."""

TOUCHED_BYTES_MAX = 8 << 30
"""Of one mapping; its page tables take 16 MiB then, and a second has gone into them."""

REST_RATIO = 50
"""Touching memory beside other work, one rests so many times as long as a piece took: 2 % of a
core, and hardly a page is touched before ``warming`` has cleared it."""

BUSY_REST_S = 2.0
"""Of who clears pages and has no core for itself. It notices after some 30 ms, so that it takes
2 % of a core. The kernel alone gives an idle task 8 % beside niced ones, as Ray's workers are."""

Clocks = Callable[[], tuple[float, float]]
"""The time, and the processor time that this process has had; both in seconds."""

_MADV_POPULATE_READ = 22

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_GENERATION = struct.Struct("<Q")  # the header's first field
_NO_KEY = bytes(BLOCK_KEY_BYTES)


def block_checksum(key: BlockKey | None, payload: memoryview) -> int:
    """Of a payload and the key it belongs to. Releases the interpreter lock."""
    digest = checksum_of(key)
    digest.update(payload)
    return digest.intdigest()


def checksum_of(key: BlockKey | None) -> xxhash.xxh3_64:
    """``block_checksum`` of this key, which takes the payload piece by piece."""
    return xxhash.xxh3_64(key or _NO_KEY)


@dataclass(frozen=True, slots=True)
class Geometry:
    slot_count: int
    block_bytes: int

    @property
    def stride_bytes(self) -> int:
        is_large = self.block_bytes >= PAGED_FROM_BYTES
        return _round_up(self.block_bytes, mmap.PAGESIZE if is_large else ALIGNMENT_BYTES)

    @property
    def payload_offset(self) -> int:
        return _round_up(mmap.PAGESIZE + self.slot_count * HEADER_BYTES, mmap.PAGESIZE)

    @property
    def file_bytes(self) -> int:
        return _round_up(self.payload_offset + self.slot_count * self.stride_bytes, mmap.PAGESIZE)


def geometry_of(arena_bytes: int, block_bytes: int) -> Geometry:
    """As many slots as ``arena_bytes`` hold. Raises ConfigError when that is no sensible number."""
    if block_bytes <= 0:
        raise ConfigError(f"block_bytes is {block_bytes}, must be positive")
    geometry = Geometry(arena_bytes // Geometry(1, block_bytes).stride_bytes, block_bytes)
    if not 1 <= geometry.slot_count <= SLOTS_MAX:
        raise ConfigError(
            f"an arena of {arena_bytes} bytes holds {geometry.slot_count} blocks of {block_bytes}; "
            f"it must hold 1 to {SLOTS_MAX}: change store.arena_bytes"
        )
    return geometry


class Arena:
    """A mapping of the file. Made by ``create_arena`` in the node, by ``open_arena`` in clients."""

    def __init__(
        self, descriptor: int, geometry: Geometry, codec: int, *, epoch: int, writable: bool
    ) -> None:
        """``epoch``: of the node that lends it."""
        self.geometry = geometry
        self.codec = codec
        self.epoch = epoch
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(descriptor, geometry.file_bytes, access=access)
        self._view = memoryview(self._map)
        self._bytes = np.frombuffer(self._map, np.uint8)
        # Computed once: a reader asks for them at every block, with cold caches.
        self._block_bytes = geometry.block_bytes
        self._stride_bytes = geometry.stride_bytes
        self._payload_offset = geometry.payload_offset

    @classmethod
    def of(cls, descriptor: int, superblock: Superblock, *, epoch: int, writable: bool) -> "Arena":
        geometry = Geometry(superblock.slot_count, superblock.block_bytes)
        return cls(descriptor, geometry, superblock.codec, epoch=epoch, writable=writable)

    @staticmethod
    def file_bytes_of(superblock: Superblock) -> int:
        return Geometry(superblock.slot_count, superblock.block_bytes).file_bytes

    @property
    def address(self) -> int:
        """Where this process has the file mapped."""
        return int(self._bytes.ctypes.data)

    @property
    def whole(self) -> memoryview:
        return self._view

    def header(self, slot: SlotId) -> Header:
        return unpack_header(self._view, _header_at(slot))

    def headers(self) -> HeaderColumns:
        """Of all slots. Linear in the arena."""
        end = _header_at(SlotId(self.geometry.slot_count))
        return header_columns(self._view[mmap.PAGESIZE : end], self.geometry.slot_count)

    def generation(self, slot: SlotId) -> int:
        """Of the header; for who has read all of it before."""
        generation: int = _GENERATION.unpack_from(self._view, _header_at(slot))[0]
        return generation

    def write_header(self, slot: SlotId, record: Slot) -> None:
        start = _header_at(slot)
        self._view[start : start + HEADER_BYTES] = pack_header(slot, record, self.codec)

    def payload(self, slot: SlotId) -> memoryview:
        """The slot's bytes themselves, not a copy."""
        start = self._payload_at(slot)
        return self._view[start : start + self.geometry.block_bytes]

    def room(self, slot: SlotId) -> memoryview:
        """The slot's bytes, and those behind them that nobody else's begin in."""
        start = self._payload_at(slot)
        return self._view[start : start + self.geometry.stride_bytes]

    def view(self, slot: SlotId) -> memoryview:
        """``payload``, by an array of its own (``obj``), which ends with the view's last user."""
        start = self._payload_at(slot)
        return self._bytes[start : start + self._block_bytes].data

    def read(self, slot: SlotId, out: memoryview) -> None:
        """Copy the slot's bytes to ``out``. Releases the interpreter lock."""
        start = self._payload_at(slot)
        np.copyto(
            np.frombuffer(out, np.uint8), self._bytes[start : start + self.geometry.block_bytes]
        )

    def read_hashed(self, slot: SlotId, key: BlockKey | None, out: memoryview) -> int:
        """``read``, and the ``block_checksum`` of what is in ``out`` then: each piece is hashed
        while it is in the cache. Releases the interpreter lock."""
        start = self._payload_at(slot)
        target = np.frombuffer(out, np.uint8)
        digest = xxhash.xxh3_64(key or _NO_KEY)
        for begin in range(0, self.geometry.block_bytes, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, self.geometry.block_bytes)
            np.copyto(target[begin:end], self._bytes[start + begin : start + end])
            digest.update(out[begin:end])
        return digest.intdigest()

    def write(self, slot: SlotId, data: memoryview) -> None:
        """Copy ``data`` into the slot. Releases the interpreter lock."""
        start = self._payload_at(slot)
        np.copyto(
            self._bytes[start : start + self.geometry.block_bytes], np.frombuffer(data, np.uint8)
        )

    def populate(self, rest: Callable[[float], object]) -> None:
        """Map the pages, which a first write would else do one by one: 0.1 s per GB, which a worker
        pays beside its start instead of in hand-offs. Between two pieces it waits by ``rest``, for
        so many seconds; what is true ends it, and so does a page that there is no memory for.
        """
        end = min(self.geometry.file_bytes, TOUCHED_BYTES_MAX)
        for start in range(0, end, TOUCHED_BYTES):
            began_s = time.monotonic()
            if not self._map_pages(start, min(TOUCHED_BYTES, end - start)):
                break
            if rest(REST_RATIO * (time.monotonic() - began_s)):
                break

    def _map_pages(self, start: int, count: int) -> bool:
        """False where a page has no memory, and there is none: touching it would end the process,
        which the kernel says when it is asked (Linux 5.14). Releases the interpreter lock."""
        if _LIBC.madvise(self.address + start, count, _MADV_POPULATE_READ) == 0:
            return True
        if ctypes.get_errno() != errno.EINVAL:
            return False
        _touch(self._bytes[start : start + count])
        return True

    def _payload_at(self, slot: SlotId) -> int:
        assert 0 <= slot < self.geometry.slot_count, f"slot {slot}"
        return self._payload_offset + slot * self._stride_bytes


def create_arena(
    path: Path,
    geometry: Geometry,
    store_id: StoreId,
    *,
    codec: PayloadCodec = PayloadCodec.UNSTATED,
) -> Arena:
    """A new arena, all slots free. Its memory is not there yet, see ``prefault``.

    Raises:
        ConfigError: the file system has less room than it will need.
    """
    file_system = os.statvfs(path.parent)
    room = file_system.f_bavail * file_system.f_frsize
    if room < geometry.file_bytes:
        raise ConfigError(
            f"the arena needs {geometry.file_bytes} bytes, {path.parent} has {room} left; lower "
            "store.arena_bytes, or give the machine or container more shared memory"
        )
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, geometry.file_bytes)
        superblock = superblock_of(geometry, store_id, codec)
        arena = Arena.of(descriptor, superblock, epoch=superblock.epoch, writable=True)
        write_superblock(descriptor, superblock)
    finally:
        os.close(descriptor)
    return arena


def superblock_of(geometry: Geometry, store_id: StoreId, codec: int) -> Superblock:
    """Of a new arena."""
    layout = fingerprint(
        HEADER_BYTES, mmap.PAGESIZE, geometry.stride_bytes, geometry.payload_offset
    )
    return Superblock(
        codec, geometry.slot_count, geometry.block_bytes, store_id, layout, boot_id(), epoch=1
    )


def lend_arena(path: Path, epoch: int) -> int:
    """A descriptor for readers, who can be told of as long as one of them has it, or a mapping made
    through it. Where that is impossible the arena says so, and nobody takes it over."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if not (epoch and arena_users.mark_use(descriptor, epoch)):
        owned = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        write_epoch(owned, 0)
        os.close(owned)
    return descriptor


def open_arena(path: Path, store_id: StoreId, *, writable: bool, epoch: int | None = None) -> Arena:
    """Map the arena of a node on this host.

    Args:
        epoch: of the node that granted what is to be written.

    Raises:
        StoreUnavailable: there is none, it is another one, or its node is gone.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise StoreUnavailable(f"cannot open the arena {path}: {error.strerror}") from error
    try:
        if epoch:
            arena_users.mark_use(descriptor, epoch)
        if epoch is not None and (now := read_epoch(descriptor)) != epoch:
            raise StoreUnavailable(f"the arena {path} is lent under epoch {now}, not {epoch}")
        return map_arena(descriptor, store_id, writable=writable)
    finally:
        os.close(descriptor)


def map_arena(descriptor: int, store_id: StoreId, *, writable: bool) -> Arena:
    """As ``open_arena``, of an open file, which stays the caller's to close."""
    superblock = read_superblock(descriptor, store_id)
    return Arena.of(descriptor, superblock, epoch=superblock.epoch, writable=writable)


def allocate(path: Path, offset: int, count: int = ALLOCATED_BYTES) -> int:
    """Take the memory behind the file's next ``count`` bytes; the offset to go on from.

    Without, a write where there is no memory left would end the process that writes. Returns the
    file's size when everything is there. Releases the interpreter lock.

    Raises:
        OSError: there is no memory left for it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        count = min(count, os.fstat(descriptor).st_size - offset)
        if count > 0:
            os.posix_fallocate(descriptor, offset, count)
        return offset + count
    finally:
        os.close(descriptor)


def _clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def touch(path: Path, rest: Callable[[float], object], *, clocks: Clocks = _clocks) -> None:
    """Touch a file's pages, which have memory, piece by piece. The kernel clears a page when it is
    touched first: 0.3 s per GB, 2.5 where a virtual machine must get it back.

    After each piece it calls ``rest`` with the seconds to wait: none while it has a core for
    itself, ``BUSY_REST_S`` after a piece of which it spent more than half waiting for one. What is
    true ends it.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        pages = np.frombuffer(mapped, np.uint8)
        for start in range(0, len(pages), TOUCHED_BYTES):
            began_s, had_s = clocks()
            _touch(pages[start : start + TOUCHED_BYTES])
            ended_s, have_s = clocks()
            alone = ended_s - began_s <= 2 * (have_s - had_s)
            if rest(0.0 if alone else BUSY_REST_S):
                break
        del pages  # or the mapping could not be closed


def _touch(mapped: NDArray[np.uint8]) -> None:
    """Read a byte of each page, which maps it, and clears it if it is new. Releases the interpreter
    lock, as ``madvise`` does not."""
    mapped[:: mmap.PAGESIZE].max()


def _header_at(slot: SlotId) -> int:
    return mmap.PAGESIZE + slot * HEADER_BYTES


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
