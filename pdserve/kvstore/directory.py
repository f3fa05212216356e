"""The private folder of one store node in shared memory, and how those of the dead are found.

    <shared>/pdserve-<user id>/              locked while a folder in it is made or removed
    <shared>/pdserve-<user id>/<store id>/   lock, arena

A node holds a lock on its own ``lock`` file as long as it lives; the kernel gives it up with the
process, however it ends. So a folder whose lock can be had belongs to a dead node, and the next
node on the host removes it, with the socket whose path the dead one had written there. Only a node
of the same id keeps the folder, and may go on with the arena in it (``adoption``).
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.ids import StoreId

SHARED = Path("/dev/shm")
"""Where shared memory is mounted, unless a node is told otherwise."""

ARENA_NAME = "arena"
_LOCK_NAME = "lock"


class NodeDirectory:
    """Made by ``take_directory``; exists until ``remove``, or until its process has died."""

    def __init__(self, root: Path, path: Path, lock: int, dead: tuple[StoreId, ...]) -> None:
        self.path = path
        self.dead = dead
        """Nodes whose folders were removed to make room for this one."""

        self.keeps = False
        """Whether ``remove`` leaves everything to the next node of this id."""

        self._root = root
        self._lock = lock

    def note_socket(self, path: str) -> None:
        """Whoever cleans up after this node removes this socket too."""
        os.pwrite(self._lock, path.encode(), 0)

    def remove(self) -> None:
        """Remove the folder, and the one around it when no other node is there."""
        if self.keeps:
            os.close(self._lock)
            return
        with _locked(self._root):
            shutil.rmtree(self.path)
            os.close(self._lock)
            with contextlib.suppress(OSError):  # not empty
                self._root.rmdir()


def take_directory(shared: Path, store_id: StoreId) -> NodeDirectory:
    """A folder for a node of this process; those of dead nodes of other ids are removed first.

    Raises:
        ConfigError: the place is somebody else's, or a live node has this id.
    """
    root = root_of(shared)
    with _locked(root):
        dead = tuple(_remove_stale(root, keep=store_id))
        path = root / store_id
        path.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(f"a live store node has {path}; give this one another id") from None
        _remove_socket_of(lock)
        os.ftruncate(lock, 0)
    return NodeDirectory(root, path, lock, dead)


def remove_dead(shared: Path, store_id: StoreId) -> None:
    """Remove what a node of this id left when it was killed; nothing, if it lives or left nothing.

    Raises:
        ConfigError: the place is somebody else's.
    """
    root = root_of(shared)
    if not (root / store_id).exists():
        return
    with _locked(root):
        for _ in _remove_stale(root, only=store_id):
            pass
        with contextlib.suppress(OSError):  # not empty
            root.rmdir()


def root_of(shared: Path) -> Path:
    return shared / f"pdserve-{os.getuid()}"


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Alone in ``root``, which is made when it is missing."""
    while True:
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
        status = root.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(
                f"{root} has owner {status.st_uid} and mode {status.st_mode & 0o777:o}; it must be "
                f"this user's ({os.getuid()}) with mode 700"
            )
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink > 0:
            break
        os.close(descriptor)  # the last node left and removed it while we waited
    try:
        yield
    finally:
        os.close(descriptor)


def _remove_stale(
    root: Path, *, keep: StoreId | None = None, only: StoreId | None = None
) -> Iterator[StoreId]:
    for path in root.iterdir():
        if path.name == keep or only not in (None, path.name):
            continue
        try:
            lock = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # its process died between making folder and lock
            shutil.rmtree(path)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # alive
        else:
            _remove_socket_of(lock)
            shutil.rmtree(path)
            yield StoreId(path.name)
        finally:
            os.close(lock)


def _remove_socket_of(lock: int) -> None:
    """Of the dead node that had this lock, if it had got so far."""
    socket_path = os.pread(lock, 4096, 0).decode()
    if socket_path:
        Path(socket_path).unlink(missing_ok=True)
