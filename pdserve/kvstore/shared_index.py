"""Which block is in which slot, in shared memory: the node writes it, readers on its host map it.

    superblock   one page: geometry, and how many blocks could not be listed
    tags         4 bytes per lane: the beginning of a block's key; 0 where the lane is empty
    lanes        4 bytes per lane: the block's slot
    spilled      1 byte per bucket: blocks of this bucket that lie in one of the next
    marks        8 bytes per slot: the generation of a block that may be found, else 0
    keys         16 bytes per slot

A hash table of buckets with eight lanes, a third of them in use, in arrays of one kind each, so
that a reader gathers the buckets of a whole prefix in a few calls of numpy. A block whose bucket is
full lies in one of the next ``NEIGHBOURS``; where those are full too it is not listed, and found by
asking the node alone.

There is one writer and no lock. A lane never moves, and a tag is written last and cleared first; so
a block that stays where it is, is found, whatever happens around it. A reader that catches a lane
between two owners gets a wrong slot, and notices: what it has found is a *candidate* until it has
pinned the slot and ``confirm`` has read, after that, mark and whole key. Mark and key are written
before a mark says that the block may be found, in this order, which readers see on processors that
keep the order of stores and of loads (``hazards.ORDERED``).
"""

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import ConfigError, StoreUnavailable
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, SlotId
from pdserve.kvstore.slot_states import Slot, SlotState

LANES = 8
"""Of a bucket: their tags are half a cache line."""

LANES_PER_SLOT = 3
"""A third of the lanes is in use at most, and one bucket in 500 overflows: a lookup that finds its
whole prefix nearly always ends with the first gathering."""

NEIGHBOURS = 3

PIECE_KEYS = 512
"""Looked up at once, so that a long prompt of which little is stored costs little."""

_MAGIC = b"pdsvix\0\0"
_VERSION = 2
_SUPERBLOCK = struct.Struct("<8sIIQ")
_UNLISTED_AT = 64
_UNLISTED = np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class _Layout:
    slot_count: int

    @property
    def bucket_count(self) -> int:
        return -(-self.slot_count * LANES_PER_SLOT // LANES)

    @property
    def arrays(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Type and shape of each, in order; a bucket's neighbours follow it without a seam."""
        buckets = self.bucket_count + NEIGHBOURS
        return (
            ("<i4", (buckets, LANES)),
            ("<u4", (buckets * LANES,)),
            ("u1", (buckets,)),
            ("<u8", (self.slot_count,)),
            ("<u8", (self.slot_count, 2)),
        )

    @property
    def file_bytes(self) -> int:
        return self._spans()[-1][1]

    def _spans(self) -> list[tuple[int, int]]:
        spans = []
        end = mmap.PAGESIZE
        for kind, shape in self.arrays:
            start = -(-end // 64) * 64
            end = start + int(np.prod(shape)) * np.dtype(kind).itemsize
            spans.append((start, end))
        return spans

    def of(self, mapped: mmap.mmap) -> tuple[NDArray[Any], ...]:
        return tuple(
            np.frombuffer(mapped, kind, count=int(np.prod(shape)), offset=start).reshape(shape)
            for (kind, shape), (start, _) in zip(self.arrays, self._spans(), strict=True)
        )


class SharedIndex:
    """The node's side. Made by ``create_index``."""

    def __init__(self, mapped: mmap.mmap, layout: _Layout) -> None:
        self._bucket_count = layout.bucket_count
        tags, lanes, spilled, marks, keys = layout.of(mapped)
        # Single elements: a memoryview's are read and written in a third of the time of numpy's.
        self._lane_tags = tags.data.cast("B").cast("i")
        self._lane_slots = lanes.data
        self._spilled = spilled.data
        self._generations = marks.data
        self._keys = keys.data.cast("B")
        self._unlisted = np.frombuffer(mapped, _UNLISTED, 1, _UNLISTED_AT).data
        self._lane_of = np.full(layout.slot_count, _NOWHERE, np.int32).data

    def note(self, slot: SlotId, record: Slot) -> None:
        """What ``slot`` is now; only a COMMITTED one is found."""
        if self._lane_of[slot] != _NOWHERE:
            if self._generations[slot] == record.generation and _is_listed(record):
                return
            self._remove(slot)
        if _is_listed(record):
            assert record.key is not None
            self._add(slot, record.key, record.generation)

    def hide(self, slots: Sequence[SlotId]) -> None:
        """Nobody who reads a mark from now on takes these blocks for stored."""
        for slot in slots:
            self._generations[slot] = 0

    def _add(self, slot: SlotId, key: BlockKey, generation: int) -> None:
        start = slot * BLOCK_KEY_BYTES
        self._keys[start : start + BLOCK_KEY_BYTES] = key
        self._generations[slot] = generation
        home, tag = home_of(key, self._bucket_count), tag_of(key)
        lane = self._empty_lane(home) if tag else None
        if lane is None:
            self._unlisted[0] += 1
            self._lane_of[slot] = _UNLISTED_LANE
            return
        if lane // LANES != home:
            self._spilled[home] += 1
        self._lane_slots[lane] = slot
        self._lane_tags[lane] = tag
        self._lane_of[slot] = lane

    def _remove(self, slot: SlotId) -> None:
        self._generations[slot] = 0
        lane, self._lane_of[slot] = self._lane_of[slot], _NOWHERE
        if lane == _UNLISTED_LANE:
            self._unlisted[0] -= 1
            return
        self._lane_tags[lane] = 0
        start = slot * BLOCK_KEY_BYTES
        home = home_of(self._keys[start : start + BLOCK_KEY_BYTES], self._bucket_count)
        if lane // LANES != home:
            self._spilled[home] -= 1

    def _empty_lane(self, home: int) -> int | None:
        for bucket in range(home, home + NEIGHBOURS + 1):
            first = bucket * LANES
            for lane in range(first, first + LANES):
                if self._lane_tags[lane] == 0:
                    return lane
        return None


class IndexReader:
    """A reader's side. Made by ``map_index``."""

    def __init__(self, mapped: mmap.mmap, layout: _Layout) -> None:
        self._bucket_count = layout.bucket_count
        self._tags, lanes, self._spilled, self._marks, self._keys = layout.of(mapped)
        self._lanes: NDArray[np.uint32] = lanes
        self._lane_tags = self._tags.data.cast("B").cast("i")
        self._unlisted = np.frombuffer(mapped, _UNLISTED, 1, _UNLISTED_AT)

    @property
    def unlisted_count(self) -> int:
        """Blocks that only the node can find."""
        return int(self._unlisted[0])

    def lookup(self, keys: bytes) -> NDArray[np.uint32]:
        """Candidates for the longest stored prefix of a chain, whose keys are ``keys`` joined."""
        if len(keys) == BLOCK_KEY_BYTES and (lane := self._lane_at_home(keys)) is not None:
            return self._lanes[lane : lane + 1].copy()
        halves = np.frombuffer(keys, "<i8")[::2]
        if len(halves) <= PIECE_KEYS:
            return self._lookup_piece(halves)
        pieces = []
        for start in range(0, len(halves), PIECE_KEYS):
            piece = halves[start : start + PIECE_KEYS]
            pieces.append(self._lookup_piece(piece))
            if len(pieces[-1]) < len(piece):
                break
        return np.concatenate(pieces)

    def confirm(self, slots: NDArray[np.uint32], keys: bytes) -> NDArray[np.uint64] | None:
        """The generations of pinned candidates; None when one is not the block it was taken for."""
        # The mark first: once it says that a pinned block is there, its key does not change.
        generations = self._marks.take(slots, mode="clip")
        if not generations.all():
            return None
        found = self._keys.take(slots, axis=0, mode="clip").tobytes()
        return generations if keys.startswith(found) else None

    def _lane_at_home(self, key: bytes) -> int | None:
        """Where one block is, if it is in its own bucket: a third of what numpy's calls take."""
        first = home_of(key, self._bucket_count) * LANES
        try:
            return first + self._lane_tags[first : first + LANES].tolist().index(tag_of(key))
        except ValueError:
            return None

    def _lookup_piece(self, halves: NDArray[np.int64]) -> NDArray[np.uint32]:
        """``halves``: the first ones of keys."""
        homes = halves % self._bucket_count
        tags = halves.astype(np.int32)  # their lower halves
        hits = (self._tags.take(homes, axis=0, mode="clip") == tags[:, None]).ravel().nonzero()[0]
        rows = hits >> 3
        if len(hits) == len(tags) and (rows[1:] > rows[:-1]).all():
            # One hit for each key, the usual case of a prefix that is stored.
            lanes = (homes << 3) + (hits & 7)
        else:
            lanes = self._lanes_of(tags, homes, hits)
        slots: NDArray[np.uint32] = self._lanes.take(lanes, mode="clip")
        return slots

    def _lanes_of(
        self, tags: NDArray[np.int32], homes: NDArray[np.int64], hits: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Of the prefix that is found at home or beside it."""
        rows = hits >> 3
        lanes = np.full(len(tags), _NOWHERE, np.int64)
        lanes[rows] = (homes[rows] << 3) + (hits & 7)
        missing = (lanes < 0).nonzero()[0]
        spilt = missing[self._spilled.take(homes[missing], mode="clip") > 0]
        if len(spilt):
            beside = homes[spilt, None] + _BESIDE
            found = self._tags.take(beside, axis=0, mode="clip").reshape(len(spilt), -1)
            at, lane = (found == tags[spilt, None]).nonzero()
            lanes[spilt[at]] = ((homes[spilt[at]] + 1) << 3) + lane
            missing = (lanes < 0).nonzero()[0]
        return lanes[: missing[0]] if len(missing) else lanes


def tag_of(key: bytes) -> int:
    return int.from_bytes(key[:4], "little", signed=True)


def home_of(key: bytes | memoryview, bucket_count: int) -> int:
    return int.from_bytes(key[:8], "little", signed=True) % bucket_count


def index_bytes(slot_count: int) -> int:
    """Of the file, for so many slots."""
    return _Layout(slot_count).file_bytes


def create_index(path: Path, slot_count: int) -> SharedIndex:
    """A new index that lists nothing. Raises ConfigError when there is no memory for it."""
    layout = _Layout(slot_count)
    path.unlink(missing_ok=True)  # a predecessor's; who has mapped it keeps it
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, layout.file_bytes)
        superblock = _SUPERBLOCK.pack(_MAGIC, _VERSION, LANES_PER_SLOT, layout.slot_count)
        os.pwrite(descriptor, superblock, 0)
        return SharedIndex(mmap.mmap(descriptor, layout.file_bytes), layout)
    except OSError as error:
        raise ConfigError(
            f"no memory for the index, {layout.file_bytes} bytes in {path.parent}: "
            f"{error.strerror}; lower store.arena_bytes"
        ) from error
    finally:
        os.close(descriptor)


def map_index(descriptor: int) -> IndexReader:
    """Map a node's index for reading. Raises StoreUnavailable when it is none of this release."""
    superblock = os.pread(descriptor, _SUPERBLOCK.size, 0).ljust(_SUPERBLOCK.size, b"\0")
    magic, version, lanes_per_slot, slot_count = _SUPERBLOCK.unpack(superblock)
    if (magic, version, lanes_per_slot) != (_MAGIC, _VERSION, LANES_PER_SLOT):
        raise StoreUnavailable(
            f"the node's index is {magic!r} in version {version}, not {_MAGIC!r} in version "
            f"{_VERSION}; run one release everywhere"
        )
    layout = _Layout(slot_count)
    mapped = mmap.mmap(descriptor, layout.file_bytes, access=mmap.ACCESS_READ)
    return IndexReader(mapped, layout)


def _is_listed(record: Slot) -> bool:
    return record.state is SlotState.COMMITTED


_NOWHERE = -1
_UNLISTED_LANE = -2
_BESIDE = np.arange(1, NEIGHBOURS + 1)
