"""One SQLite file that the processes of a host share, whichever of them is killed or suspended.

Readers and writers do not wait for each other (write-ahead log), so a process that is suspended
while it reads, or while it has the file open, stops nobody; one that is suspended in the fraction
of a millisecond in which it writes stops other writers until it is killed or wakes.

Each process keeps one connection: the last one to close cleans up, for which it locks the file. A
file that was removed, and made anew by somebody, is opened anew.
"""

import contextlib
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

RETRY_S = 0.01


class TableFile:
    """For several threads, one at a time."""

    def __init__(self, path: Path, schema: str, *, timeout_s: float) -> None:
        """``schema``: statements that make what is not there yet.

        Raises:
            sqlite3.Error: here and from ``transaction``; nothing takes much longer than
                ``timeout_s``.
        """
        self._path = path
        self._schema = schema
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._table: sqlite3.Connection | None = None
        self._inode = -1
        self._close: Callable[[], object] | None = None
        with self.transaction(reads=True):
            pass

    @contextlib.contextmanager
    def transaction(self, *, reads: bool = False) -> Iterator[sqlite3.Connection]:
        """All of what is done within happens, or nothing; also when it ends by an error."""
        if not self._lock.acquire(timeout=self._timeout_s):
            raise sqlite3.OperationalError("another thread waits for the file")
        try:
            table = self._opened()
            table.execute("BEGIN" if reads else "BEGIN IMMEDIATE")
            try:
                yield table
                table.execute("COMMIT")
            except BaseException:
                self._forget()
                raise
        finally:
            self._lock.release()

    def _opened(self) -> sqlite3.Connection:
        if self._table is None or self._inode != _inode(self._path):
            self._forget()
            self._table = self._open()
            self._inode = _inode(self._path)
        return self._table

    def _open(self) -> sqlite3.Connection:
        table = sqlite3.connect(
            self._path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False
        )
        try:
            # Nobody waits for the disk: what a power failure takes, it takes with all processes
            # that these entries are of.
            table.execute("PRAGMA synchronous = OFF")
            self._use_log(table)
            if table.execute("PRAGMA schema_version").fetchone() == (0,):
                table.executescript(f"BEGIN IMMEDIATE; {self._schema}; COMMIT")
        except BaseException:
            table.close()
            raise
        self._close = weakref.finalize(self, table.close)
        return table

    def _use_log(self, table: sqlite3.Connection) -> None:
        """Of several that do so at once, SQLite refuses all but one, without waiting."""
        until_s = time.monotonic() + self._timeout_s
        is_used = False
        while not is_used:
            try:
                table.execute("PRAGMA journal_mode = WAL")
                is_used = True
            except sqlite3.OperationalError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(RETRY_S)

    def _forget(self) -> None:
        """What has begun and not ended is undone."""
        self._table = None
        if self._close is not None:
            self._close()
            self._close = None


def _inode(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return os.stat(path).st_ino
    return -1
