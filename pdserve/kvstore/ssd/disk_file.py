"""Files that are written and read beside the page cache, where their file system has that.

A store's blocks are larger than what a cache of the kernel's is good for, and are in the arena
already when they are in use: a second copy there would only push out what others need. So files are
opened with ``O_DIRECT``. That wants memory, lengths and offsets to be whole pages; blocks that are
so in the arena go from there to the disk without a copy, others by way of a buffer. Where the file
system refuses, the kernel is told to forget what was written and read.

One ``DiskFiles`` may be used by several threads; each has a buffer of its own.
"""

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdserve.kvstore.ssd.format import PAGE_BYTES, round_up

_log = logging.getLogger(__name__)

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_ZEROS = bytes(PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Write:
    """Some pages, and blocks behind them, each filled up to a page border."""

    offset: int
    head: bytes
    blocks: Sequence[memoryview] = ()

    @property
    def size(self) -> int:
        return len(self.head) + sum(round_up(len(block)) for block in self.blocks)


class DiskFiles:
    def __init__(self, *, direct: bool) -> None:
        self.direct = direct
        self._local = threading.local()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="disk-beside")

    def open(self, path: Path, flags: int) -> int:
        direct = _O_DIRECT if self.direct else 0
        return os.open(path, flags | direct | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, write: Write) -> bool:
        """Whether all of it is written; not when the disk is full. OSError when it refuses."""
        offset, head, blocks = write.offset, write.head, write.blocks
        if self.direct and not all(map(_is_aligned, blocks)):
            return os.pwrite(descriptor, self._gathered(head, blocks), offset) == write.size
        parts: list[memoryview | bytes] = [self._aligned(head) if self.direct else head]
        for block in blocks:
            parts.append(block)
            if padding := round_up(len(block)) - len(block):
                parts.append(_ZEROS[:padding])
        count = os.pwritev(descriptor, parts, offset)
        self._forget(descriptor)
        return count == write.size

    def write_all(self, descriptor: int, writes: Sequence[Write]) -> tuple[int, OSError | None]:
        """How many of the first are written, and why the next is not, where the disk said so.

        Two at a time: while one's thread is woken the disk has the other.
        """
        failed: dict[int, OSError | None] = {}

        def lane(first: int) -> None:
            for index in range(first, len(writes), 2):
                if failed and index > min(failed):
                    return
                try:
                    if not self.write(descriptor, writes[index]):
                        failed[index] = None
                except OSError as error:
                    failed[index] = error

        beside = self._beside.submit(lane, 1) if len(writes) > 1 else None
        try:
            lane(0)
        finally:
            if beside is not None:
                beside.result()
        whole = min(failed, default=len(writes))
        return whole, failed.get(whole)

    def close(self) -> None:
        self._beside.shutdown()

    def read(self, descriptor: int, offset: int, outs: Sequence[memoryview]) -> int:
        """Blocks that lie behind each other, all of one size; how many were there."""
        padded = round_up(len(outs[0]))
        if padded == len(outs[0]) and (not self.direct or all(map(_is_aligned, outs))):
            count = os.preadv(descriptor, outs, offset)
        else:
            staging = self._staging(padded * len(outs))
            count = os.preadv(descriptor, [staging], offset)
            for index, out in enumerate(outs):
                out[:] = staging[index * padded : index * padded + len(out)]
        self._forget(descriptor)
        return count // padded

    def read_bytes(self, descriptor: int, offset: int, count: int) -> bytes:
        """Whole pages; fewer bytes at the end of the file."""
        staging = self._staging(round_up(count))
        return bytes(staging[: min(count, os.preadv(descriptor, [staging], offset))])

    def _gathered(self, head: bytes, blocks: Sequence[memoryview]) -> memoryview:
        padded = round_up(len(blocks[0]))
        staging = self._staging(len(head) + padded * len(blocks))
        staging[: len(head)] = head
        for index, block in enumerate(blocks):
            start = len(head) + index * padded
            staging[start : start + len(block)] = block
            staging[start + len(block) : start + padded] = _ZEROS[: padded - len(block)]
        return staging

    def _aligned(self, data: bytes) -> memoryview:
        staging = self._staging(len(data))
        staging[:] = data
        return staging

    def _staging(self, size: int) -> memoryview:
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._local.buffer = aligned_buffer(size)
        return buffer[:size]

    def _forget(self, descriptor: int) -> None:
        """What is dirty is sent to the disk first, and forgotten by a later call."""
        if not self.direct:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def files_of(directory: Path) -> DiskFiles:
    """How files in ``directory`` are best read and written; tried out with one. OSError when it
    takes none at all."""
    path = directory / "probe"
    try:
        files = DiskFiles(direct=_takes_direct(path))
    finally:
        path.unlink(missing_ok=True)
    how = "beside the page cache" if files.direct else "through the page cache: it has no O_DIRECT"
    _log.info("%s is written and read %s", directory, how)
    return files


def _takes_direct(path: Path) -> bool:
    if not _O_DIRECT:
        return False
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _O_DIRECT, 0o600)
        try:
            page = aligned_buffer(PAGE_BYTES)
            return os.pwrite(descriptor, page, 0) == os.preadv(descriptor, [page], 0) == PAGE_BYTES
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        if error.errno == errno.ENOSPC:
            return True  # it was opened so; what is there can be read
        raise


def aligned_buffer(size: int) -> memoryview:
    """Memory from a page border on."""
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def _is_aligned(view: memoryview) -> bool:
    address = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address % PAGE_BYTES == 0 and len(view) % PAGE_BYTES == 0
