"""What a process has of the machine at this moment, in figures that a leak moves.

Taken at most once in ``LOOK_NS``: a worker tells them in every report, and to count open files is
to list a folder.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from pdserve.clock import Clock, S, monotonic

LOOK_NS = 1 * S

TASKS, RESIDENT_BYTES, OPEN_FDS = "tasks", "resident_bytes", "open_fds"

METRICS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        TASKS: ("pdserve_event_loop_tasks", "Tasks of the process's event loop"),
        RESIDENT_BYTES: ("process_resident_memory_bytes", "Resident memory size in bytes"),
        OPEN_FDS: ("process_open_fds", "Number of open file descriptors"),
    }
)
"""By figure: its name for Prometheus, that of ``prometheus_client`` where it has one, and what it
is."""


class Vitals:
    """Of this process."""

    def __init__(self, *, clock: Clock = monotonic, proc: Path = Path("/proc/self")) -> None:
        self._clock = clock
        self._proc = proc
        self._looked_ns: int | None = None
        self._figures: dict[str, int] = {}

    def figures(self) -> Mapping[str, int]:
        """By the names above; asked on an event loop, whose tasks count. What the system does not
        tell is left out."""
        now_ns = self._clock()
        if self._looked_ns is None or now_ns - self._looked_ns >= LOOK_NS:
            self._looked_ns = now_ns
            self._figures = {TASKS: _task_count(), **_held(self._proc)}
        return self._figures


def _task_count() -> int:
    """0 where no loop runs."""
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:
        return 0


def _held(proc: Path) -> dict[str, int]:
    """Of memory and files; empty on systems without ``/proc``."""
    try:
        pages = int((proc / "statm").read_text().split()[1])
        fds = len(os.listdir(proc / "fd"))
    except OSError:
        return {}
    return {RESIDENT_BYTES: pages * os.sysconf("SC_PAGESIZE"), OPEN_FDS: fds}
