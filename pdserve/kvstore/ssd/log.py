"""Blocks on a disk: an append-only log in segments, which knows itself again after a restart.

    <directory>/lock            held by the one process that has the log open
    <directory>/00000007.seg    ``format`` has its bytes

Blocks are appended in batches, one write each, and read in runs: those that lie behind each other
come with one call. A block's checksum is the one that its writer took (XXH3 over key and bytes, as
in the arena). Nothing is changed in place and nothing is synced: what a crash tore is found by its
checksum, the page before a batch when the log is opened, a block when it is read. So ``read`` gives
the very bytes that were appended, or says that it cannot. A segment that is done ends with an index
of itself, so opening the log reads that, and only of a segment that a crash cut short the pages
before its batches: never a block.

When there is no room left the oldest segment goes, whole. Blocks in it that were read since are
appended again first: what is in use stays.
"""

import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.errors import CapacityError, ConfigError
from pdserve.ids import BlockKey
from pdserve.kvstore.arena import block_checksum
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.ssd.disk_file import DiskFiles, Write, aligned_buffer, files_of
from pdserve.kvstore.ssd.format import (
    PAGE_BYTES,
    Kind,
    Record,
    batch_bytes,
    batch_page,
    batch_records,
    footer,
    footer_bytes,
    superblock,
)
from pdserve.kvstore.ssd.opening import found_in

_log = logging.getLogger(__name__)

SEGMENT_BYTES = 256 << 20
SEGMENTS_MIN = 2
"""One is written while another goes."""

RETRY_AFTER_MS = 1000


@dataclass(frozen=True, slots=True)
class Block:
    """One to append. ``checksum`` is over key and payload; what is in ``room`` behind the payload,
    up to a page border, may be written too, and is nobody's."""

    key: BlockKey
    checksum: int
    room: memoryview


@dataclass(slots=True)
class ReadCounts:
    """Why blocks that the books had were not to be had."""

    wrong: int = 0  # they fail their checksum
    failed: int = 0  # the disk does not give them


@dataclass(slots=True, eq=False)
class _Segment:
    number: int
    path: Path
    descriptor: int
    end: int = PAGE_BYTES  # where the next batch begins
    size: int = PAGE_BYTES  # of the file, its footer included
    records: list[Record] = field(default_factory=list)
    is_sealed: bool = False  # nothing more is appended
    readers: int = 0
    is_gone: bool = False


@dataclass(slots=True)
class _Place:
    segment: _Segment
    record: Record
    was_read: bool = False


class SsdLog:
    """Made by ``open_log``. One thread appends at a time; ``read`` and ``in`` are for any."""

    def __init__(
        self,
        directory: Path,
        lock: int,
        files: DiskFiles,
        kind: Kind,
        capacity_bytes: int,
        segment_bytes: int,
    ) -> None:
        self._directory = directory
        self._directory_lock = lock
        self._files = files
        self.kind = kind
        self._segment_bytes = max(
            segment_bytes, PAGE_BYTES + batch_bytes(kind, 1) + footer_bytes(1)
        )
        self._capacity_bytes = capacity_bytes
        if capacity_bytes < SEGMENTS_MIN * self._segment_bytes:
            raise ConfigError(
                f"store.ssd_bytes is {capacity_bytes}, must be at least "
                f"{SEGMENTS_MIN * self._segment_bytes}: {SEGMENTS_MIN} segments"
            )
        self._segments: list[_Segment] = []  # oldest first; the last one is appended to
        self._places: dict[BlockKey, _Place] = {}
        self._gone: list[BlockKey] = []
        self._books = threading.Lock()  # over ``_places``, ``_gone``, ``readers`` and ``is_gone``
        self.counts = ReadCounts()

    @property
    def is_direct(self) -> bool:
        """Whether the page cache is left alone."""
        return self._files.direct

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[BlockKey]:
        """As they were appended: parents before children, but for those appended again."""
        return iter(tuple(self._places))

    def append(self, blocks: Sequence[Block]) -> None:
        """Store blocks, those that are not there, in as few writes as they fit in.

        Raises:
            CapacityError: the disk is full, or does not take them. What was there is there still.
        """
        for block in blocks:
            assert self._fits(block.room), f"{len(block.room)} bytes for a block"
        rest = [block for block in blocks if block.key not in self._places]
        while rest:
            batches = self._fitting(rest)
            if not batches:
                self._next_segment()
                continue
            self._write(batches)
            rest = rest[sum(map(len, batches)) :]

    def read(self, keys: Sequence[BlockKey], outs: Sequence[memoryview]) -> list[int | None]:
        """Copy blocks to ``outs``; the checksum of each, which holds. Behind the block, up to a
        page border, something is written where there is room.

        None for one that is not there, that the disk does not give, or that is not what was
        appended; of the latter two, ``counts`` has the number, and they are forgotten.
        """
        assert all(map(self._fits, outs)), "an out is smaller than a block"
        checksums: list[int | None] = []
        while len(checksums) < len(keys):
            start = len(checksums)
            with self._books:
                run = self._run(keys[start : start + self.kind.batch_blocks])
                if run:
                    run[0].segment.readers += 1
            if not run:
                checksums.append(None)
                continue
            try:
                checksums += self._read_run(run, outs[start : start + len(run)])
            finally:
                self._let_go(run[0].segment)
        return checksums

    def take_gone(self) -> list[BlockKey]:
        """What has been forgotten since the last call, and is not there again."""
        with self._books:
            gone, self._gone = self._gone, []
            return [key for key in gone if key not in self._places]

    def runs(self, keys: Sequence[BlockKey]) -> list[int]:
        """How many of the keys come with each call of the disk; 1 for those that are not there."""
        counts: list[int] = []
        with self._books:
            while (start := sum(counts)) < len(keys):
                run = self._run(keys[start : start + self.kind.batch_blocks])
                counts.append(max(1, len(run)))
        return counts

    def close(self) -> None:
        """When nobody reads or appends any more."""
        self._files.close()
        if self._segments:
            self._seal(self._segments[-1])
        for segment in self._segments:
            os.close(segment.descriptor)
        self._segments.clear()
        os.close(self._directory_lock)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def _fits(self, room: memoryview) -> bool:
        return len(room) >= self.kind.block_bytes

    def _run(self, keys: Sequence[BlockKey]) -> list[_Place]:
        """Where the first of the keys are, as far as they lie behind each other."""
        run: list[_Place] = []
        for key in keys:
            place = self._places.get(key)
            if place is None:
                break
            if run:
                before = run[-1]
                follows = before.record.offset + self.kind.padded_bytes == place.record.offset
                if before.segment is not place.segment or not follows:
                    break
            run.append(place)
        return run

    def _read_run(self, run: Sequence[_Place], outs: Sequence[memoryview]) -> list[int | None]:
        segment, first = run[0].segment, run[0].record
        try:
            views = [out[: self.kind.padded_bytes] for out in outs]
            count = self._files.read(segment.descriptor, first.offset, views)
        except OSError as error:
            if len(run) > 1:  # a bad place costs the blocks there, and no others
                pieces = zip(run, outs, strict=True)
                return [self._read_run([place], [out])[0] for place, out in pieces]
            _log.warning("%s: a block cannot be read: %s", segment.path, error.strerror)
            count = 0
        checksums: list[int | None] = []
        for index, (place, out) in enumerate(zip(run, outs, strict=True)):
            record = place.record
            if index >= count:
                self._forget(place)
                self.counts.failed += 1
                checksums.append(None)
            elif block_checksum(record.key, out[: self.kind.block_bytes]) != record.checksum:
                self._forget(place)
                self.counts.wrong += 1
                _log.warning(
                    "%s: a block at %d is not what was written", segment.path, record.offset
                )
                checksums.append(None)
            else:
                place.was_read = True
                checksums.append(record.checksum)
        return checksums

    def _forget(self, place: _Place) -> None:
        with self._books:
            self._forget_in_books(place)

    def _forget_in_books(self, place: _Place) -> None:
        key = place.record.key
        if self._places.get(key) is place:
            del self._places[key]
            self._gone.append(key)

    def _let_go(self, segment: _Segment) -> None:
        with self._books:
            segment.readers -= 1
            is_last = segment.is_gone and segment.readers == 0
        if is_last:
            os.close(segment.descriptor)

    # ── segments ─────────────────────────────────────────────────────────────────────────────────

    def _fitting(self, blocks: Sequence[Block]) -> list[Sequence[Block]]:
        """The first of the blocks, as far as they go into the last segment, in batches."""
        batches: list[Sequence[Block]] = []
        if not self._segments or self._segments[-1].is_sealed:
            return batches
        end, taken = self._segments[-1].end, 0
        records = len(self._segments[-1].records)
        while taken < len(blocks):
            count = min(len(blocks) - taken, self.kind.batch_blocks)
            while count and not self._is_room(end, records + taken, count):
                count -= 1
            if count == 0:
                break
            batches.append(blocks[taken : taken + count])
            end += batch_bytes(self.kind, count)
            taken += count
        return batches

    def _is_room(self, end: int, record_count: int, more: int) -> bool:
        """For so many more blocks behind ``end``, and for an index of all."""
        end += batch_bytes(self.kind, more)
        return end + footer_bytes(record_count + more) <= self._segment_bytes

    def _write(self, batches: Sequence[Sequence[Block]]) -> None:
        """Behind the end of the last segment. What comes before the first that fails is there."""
        segment, offset = self._segments[-1], self._segments[-1].end
        writes = []
        for batch in batches:
            named = [(block.key, block.checksum) for block in batch]
            page = batch_page(self.kind, segment.number, offset, named)
            rooms = [block.room[: self.kind.padded_bytes] for block in batch]
            writes.append(Write(offset, page, rooms))
            offset += batch_bytes(self.kind, len(batch))
        whole, error = self._files.write_all(segment.descriptor, writes)
        for write in writes[:whole]:
            self._enter(segment, batch_records(self.kind, segment.number, write.offset, write.head))
            segment.end = write.offset + write.size
        segment.size = max(segment.size, segment.end)
        if whole < len(writes):
            raise _full(segment.path, error)

    def _enter(self, segment: _Segment, records: Sequence[Record]) -> None:
        segment.records += records
        with self._books:
            for record in records:
                self._places.pop(record.key, None)  # so that it stands behind its parent
                self._places[record.key] = _Place(segment, record)

    def _next_segment(self) -> None:
        """Begin another, and let the oldest go for it."""
        if self._segments:
            self._seal(self._segments[-1])
        self._segments.append(self._new_segment())
        while self._bytes_at_most() > self._capacity_bytes:
            self._drop_oldest()

    def _bytes_at_most(self) -> int:
        return sum(
            segment.size if segment.is_sealed else self._segment_bytes for segment in self._segments
        )

    def _new_segment(self) -> _Segment:
        number = self._segments[-1].number + 1 if self._segments else 1
        path = self._directory / f"{number:08}.seg"
        try:
            descriptor = self._files.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        except OSError as error:
            raise _full(path, error) from error
        segment = _Segment(number, path, descriptor)
        try:
            is_whole = self._files.write(descriptor, Write(0, superblock(self.kind, number)))
        except OSError as error:
            self._remove(segment)
            raise _full(path, error) from error
        if not is_whole:
            self._remove(segment)
            raise _full(path)
        return segment

    def _drop_oldest(self) -> None:
        """Those of its blocks that are in use are there again, in the last segment."""
        oldest = self._segments.pop(0)
        # A block is there twice when it was found to be wrong, and stored again.
        keys = dict.fromkeys(record.key for record in oldest.records)
        with self._books:
            places = [
                place
                for key in keys
                if (place := self._places.get(key)) and place.segment is oldest
            ]
        try:
            self._keep_used([place for place in places if place.was_read])
        finally:
            with self._books:
                for place in places:
                    self._forget_in_books(place)
            self._remove(oldest)

    def _keep_used(self, places: Sequence[_Place]) -> None:
        """Append them again, up to half of a segment, or dropping one would make no room."""
        batch_blocks = self.kind.batch_blocks
        buffer = aligned_buffer(self.kind.padded_bytes * batch_blocks if places else 0)
        for start in range(0, len(places), batch_blocks):
            keys = [place.record.key for place in places[start : start + batch_blocks]]
            outs = [
                buffer[at : at + self.kind.padded_bytes]
                for at in range(0, self.kind.padded_bytes * len(keys), self.kind.padded_bytes)
            ]
            blocks = [
                Block(key, checksum, out)
                for key, checksum, out in zip(keys, self.read(keys, outs), outs, strict=True)
                if checksum is not None
            ]
            half = self._segment_bytes // 2 - self._segments[-1].end
            batches = self._fitting(blocks[: max(0, half // self.kind.padded_bytes)])
            if not batches:
                break
            self._write(batches)

    def _seal(self, segment: _Segment) -> None:
        """Write its index. Without one it is read page by page when the log is opened."""
        if segment.is_sealed:
            return
        segment.is_sealed = True
        index = Write(segment.end, footer(segment.number, segment.end, segment.records))
        try:
            os.ftruncate(segment.descriptor, segment.end)  # what half a batch left
            if self._files.write(segment.descriptor, index):
                segment.size = segment.end + index.size
        except OSError as error:
            _log.warning("%s gets no index: %s", segment.path, error.strerror)

    def _remove(self, segment: _Segment) -> None:
        segment.path.unlink(missing_ok=True)
        with self._books:
            segment.is_gone = True
            is_unread = segment.readers == 0
        if is_unread:
            os.close(segment.descriptor)

    # ── opening ──────────────────────────────────────────────────────────────────────────────────

    def load(self) -> None:
        """Enter what an earlier process left. Segments of another kind are removed."""
        others = 0
        for path in sorted(self._directory.glob("[0-9]" * 8 + ".seg")):
            segment = _Segment(int(path.stem), path, self._files.open(path, os.O_RDWR))
            found = found_in(self._files, self.kind, segment.descriptor, segment.number)
            others += found is None
            if found is None or not found.records:
                self._remove(segment)
                continue
            segment.size = os.fstat(segment.descriptor).st_size
            segment.end, segment.is_sealed = found.end, found.has_index
            self._enter(segment, found.records)
            self._seal(segment)  # it is not appended to: behind its end may be half of a batch
            self._segments.append(segment)
        if others:
            _log.info("%d segments of another version or kind of blocks are discarded", others)
        while self._bytes_at_most() > self._capacity_bytes:
            self._drop_oldest()
        self._gone.clear()  # nobody knew of it


def open_log(
    directory: Path,
    block_bytes: int,
    capacity_bytes: int,
    *,
    codec: PayloadCodec = PayloadCodec.UNSTATED,
    segment_bytes: int = SEGMENT_BYTES,
) -> SsdLog:
    """The log in ``directory``, which is made if it is not there, with what it holds.

    Raises:
        ConfigError: another process has it open, it cannot be written, or there is too little room.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"store.ssd_directory: cannot use {directory}: {error.strerror}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        files = files_of(directory)
        kind = Kind(block_bytes, codec)
        log = SsdLog(directory, lock, files, kind, capacity_bytes, segment_bytes)
        log.load()
    except BlockingIOError:
        os.close(lock)
        raise ConfigError(
            f"store.ssd_directory: another store node has {directory} open; each needs its own"
        ) from None
    except OSError as error:
        os.close(lock)
        raise ConfigError(
            f"store.ssd_directory: cannot use {directory}: {error.strerror}"
        ) from error
    except BaseException:
        os.close(lock)
        raise
    return log


def _full(path: Path, error: OSError | None = None) -> CapacityError:
    """What the disk said, or that it took a part."""
    reason = "the disk is full" if error is None else error.strerror
    return CapacityError(f"{path}: {reason}", retry_after_ms=RETRY_AFTER_MS)
