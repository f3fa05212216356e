"""Who has an arena mapped, when the node that lent it is gone.

A lock on a byte of the file, by an open file description (``F_OFD_SETLK``), lasts as long as that
description: until the last descriptor of it is closed and the last mapping made through it is gone,
in whatever process, however that ended. So the node puts a shared lock on what it lends, and a
writer on what it opens itself, each on the byte of the node's epoch. A successor asks for the bytes
of all epochs before its own: as long as one of them is locked, somebody may touch what the dead had
lent. No process is named, so none can be mistaken for another; nothing here is a timer.

A writer might open the arena when its node is dead and the successor has asked already. So it
locks first and reads the epoch then, and the successor writes its epoch first and asks then: one of
the two notices the other.
"""

import fcntl
import os
import struct
from pathlib import Path

_FIRST_AT = 1 << 40
"""The byte of epoch 0, far behind every arena's end; locks need no bytes that exist."""

_LOCK = struct.Struct("@hhqqi4x")


def mark_use(descriptor: int, epoch: int) -> bool:
    """Lock the byte of ``epoch`` for as long as this description lives. Whether that is possible
    here."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, epoch, 1))
    except OSError:  # a kernel or a file system without such locks
        return False
    return True


def is_used_before(path: Path, epoch: int) -> bool:
    """Whether somebody has the arena from a node of an epoch before this one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        asked = _lock(fcntl.F_WRLCK, 0, epoch)
        found = _LOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
        return bool(found[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)


def wait_until_unused_before(path: Path, epoch: int) -> None:
    """Return once ``is_used_before`` is False. Releases the interpreter lock.

    Raises:
        OSError: the arena is gone.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _lock(fcntl.F_WRLCK, 0, epoch))
    finally:
        os.close(descriptor)


def _lock(kind: int, epoch: int, count: int) -> bytes:
    return _LOCK.pack(kind, os.SEEK_SET, _FIRST_AT + epoch, count, 0)
