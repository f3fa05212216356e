"""What an earlier process left of a segment: its index, or page by page what is before the place
where a crash cut it short. No block is read."""

import os
from dataclasses import dataclass

from pdserve.kvstore.ssd.disk_file import DiskFiles
from pdserve.kvstore.ssd.format import (
    PAGE_BYTES,
    Kind,
    Record,
    batch_bytes,
    batch_records,
    footer_records,
    footer_start,
    superblock,
)


@dataclass(frozen=True, slots=True)
class Found:
    records: list[Record]
    end: int  # of the last of them; what is behind may be half of a batch
    has_index: bool


def found_in(files: DiskFiles, kind: Kind, descriptor: int, number: int) -> Found | None:
    """None when the segment is of another version or kind."""
    if files.read_bytes(descriptor, 0, PAGE_BYTES) != superblock(kind, number):
        return None
    size = os.fstat(descriptor).st_size
    return _indexed(files, descriptor, number, size) or _scanned(
        files, kind, descriptor, number, size
    )


def _indexed(files: DiskFiles, descriptor: int, number: int, size: int) -> Found | None:
    """By the footer, where it is there and whole."""
    if size < 2 * PAGE_BYTES or size % PAGE_BYTES:
        return None
    last = files.read_bytes(descriptor, size - PAGE_BYTES, PAGE_BYTES)
    start = footer_start(number, size, last)
    if start is None:
        return None
    records = footer_records(files.read_bytes(descriptor, start, size - start))
    return None if records is None else Found(records, start, has_index=True)


def _scanned(files: DiskFiles, kind: Kind, descriptor: int, number: int, size: int) -> Found:
    """Up to the first batch that is not whole."""
    records: list[Record] = []
    end = offset = PAGE_BYTES
    while True:
        page = files.read_bytes(descriptor, offset, PAGE_BYTES)
        named = batch_records(kind, number, offset, page)
        there = [each for each in named if each.offset + kind.padded_bytes <= size]
        if there:
            records += there
            end = there[-1].offset + kind.padded_bytes
        if not named:
            return Found(records, end, has_index=False)
        offset += batch_bytes(kind, len(named))
