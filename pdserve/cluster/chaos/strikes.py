"""Carries a strike out, and takes back what does not end by itself. Decides nothing.

What is stopped is continued, what is filled is emptied, whatever happens in between: ``Striker`` is
a context manager.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from pdserve.cluster.chaos.plan import Strike
from pdserve.cluster.chaos.targets import arena_of
from pdserve.ids import SlotId, StoreId
from pdserve.kvstore.arena import open_arena
from pdserve.kvstore.slot_states import SlotState

SHM = Path("/dev/shm")
SHM_RESERVE_BYTES = 64 << 20
"""Left for everybody else on the machine."""

DISK_PIECE_BYTES = 8 << 20


class Striker:
    def __init__(self, find: Callable[[], Mapping[str, list[int]]], disk: Path | None) -> None:
        """
        Args:
            find: the cluster's processes by role, now.
            disk: where the store's disk is; None: it has none.
        """
        self._find = find
        self._disk = disk
        self._stopped: dict[int, threading.Timer] = {}
        self._most: dict[str, int] = {}  # of each role, so many were seen at once
        self._filling = SHM / f"pdserve-chaos-{os.getpid()}"
        self._threads: list[threading.Thread] = []
        self._over = threading.Event()

    def __enter__(self) -> "Striker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.heal()

    def heal(self) -> None:
        """Nothing that was begun goes on. Idempotent."""
        self._over.set()
        for pid, timer in list(self._stopped.items()):
            timer.cancel()
            self._continue(pid)
        for thread in self._threads:
            thread.join()
        self._filling.unlink(missing_ok=True)

    def carry_out(self, strike: Strike) -> str:
        """What was done, for the report."""
        match strike.kind:
            case "kill":
                return self._signal(strike, signal.SIGKILL)
            case "stop":
                return self._signal(strike, signal.SIGSTOP)
            case "corrupt":
                return self._corrupt(strike)
            case "shm":
                return self._background(self._fill, strike)
            case "disk" if self._disk is None:
                return "the store has no disk"
            case "disk":
                return self._background(self._write, strike)
            case kind:
                raise AssertionError(f"a plan has no {kind}")

    def _signal(self, strike: Strike, number: signal.Signals) -> str:
        pids = self._find()[strike.role]
        if not pids:
            return f"no {strike.role} was there"
        pid = pids[strike.number % len(pids)]
        most = self._most[strike.role] = max(len(pids), self._most.get(strike.role, 0))
        well = [each for each in pids if each not in self._stopped]
        if most > 1 and len(well) < most and well in ([], [pid]):
            # What is promised is for clusters in which every role has somebody; and a request that
            # is with two workers as they die is refused, for all that a cluster can know of it.
            return f"{strike.role} {pid} is the last one that is well, and is left alone"
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return f"{strike.role} {pid} had just gone"
        if number is signal.SIGSTOP:
            timer = threading.Timer(strike.span_s, self._continue, (pid,))
            self._stopped[pid] = timer
            timer.start()
        return f"{number.name} to {strike.role} {pid}"

    def _continue(self, pid: int) -> None:
        self._stopped.pop(pid, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _corrupt(self, strike: Strike) -> str:
        nodes = self._find()["store"]
        path = arena_of(nodes[strike.number % len(nodes)]) if nodes else None
        if path is None:
            return "no arena was there"
        return flip_bit(path, random.Random(strike.number))

    def _background(self, action: Callable[[float], None], strike: Strike) -> str:
        until_s = time.monotonic() + strike.span_s
        thread = threading.Thread(target=action, args=(until_s,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return f"{strike.kind} for {strike.span_s:.1f} s"

    def _fill(self, until_s: float) -> None:
        room = os.statvfs(SHM)
        count = room.f_bavail * room.f_frsize - SHM_RESERVE_BYTES
        try:
            with self._filling.open("wb") as file, contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, max(1, count))
            self._over.wait(max(0.0, until_s - time.monotonic()))
        finally:
            self._filling.unlink(missing_ok=True)

    def _write(self, until_s: float) -> None:
        assert self._disk is not None
        path, piece = self._disk / f"chaos-{os.getpid()}", b"\0" * DISK_PIECE_BYTES
        try:
            with path.open("wb") as file, contextlib.suppress(OSError):
                while time.monotonic() < until_s and not self._over.is_set():
                    file.seek(0)
                    file.write(piece)
                    os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)


def flip_bit(path: Path, dice: random.Random) -> str:
    """One bit of one block that can be found in the arena at ``path``, in its store's folder.

    The checksum in its header stays. Who reads the block for the first time finds out; a process
    that verified it earlier trusts what it verified (``store.verify``).
    """
    arena = open_arena(path, StoreId(path.parent.name), writable=True)
    committed = [
        slot
        for slot in map(SlotId, range(arena.geometry.slot_count))
        if arena.header(slot).state is SlotState.COMMITTED
    ]
    if not committed:
        return "the store was empty"
    slot = dice.choice(committed)
    place = dice.randrange(arena.geometry.block_bytes)
    arena.payload(slot)[place] ^= 1 << dice.randrange(8)
    return f"a bit of byte {place} of slot {slot} of {path.parent.name}"
