"""Whether a thread that is in a step still does anything. Pure.

A long step is not a hang: beside other work, on a laptop, an honest one may take seconds. A thread
that waits for a lock, or for a device that has died, can be told from it by its processor time,
which stands still; one that computes gets some, however busy the machine is. What a compiler does
in a process that the step has started counts as well.

What this cannot see is a loop without an end, or a wait that spins, as a GPU's may: for those the
bound on a step's length stays (``cluster.worker_shell.STUCK_S``).
"""

from dataclasses import dataclass

from pdserve.clock import MS, S

HUNG_NS = 2 * S
"""Without any processor time, in one step."""

CPU_NS_MIN = 1 * MS
"""Less is what a wait itself may cost."""

LOOK_NS_MAX = S // 2
"""Of the time between two looks, so much counts: who looks may have stood still itself."""


@dataclass(slots=True)
class HangWatch:
    """Told at regular intervals, a few in ``HUNG_NS``."""

    _step_ns: int | None = None
    _cpu_ns: int = 0
    _looked_ns: int = 0
    _idle_ns: int = 0

    def observe(
        self, step_began_ns: int | None, cpu_ns: int, now_ns: int, *, waits_for_child: bool
    ) -> bool:
        """Whether the thread hangs.

        Args:
            step_began_ns: of the step it is in; None: of none.
            cpu_ns: processor time of the thread so far.
            now_ns: the instant of this look.
            waits_for_child: a process that the thread started is running.
        """
        moved = cpu_ns - self._cpu_ns >= CPU_NS_MIN or step_began_ns != self._step_ns
        if step_began_ns is None or moved or waits_for_child:
            self._step_ns, self._cpu_ns, self._idle_ns = step_began_ns, cpu_ns, 0
        else:
            self._idle_ns += min(LOOK_NS_MAX, now_ns - self._looked_ns)
        self._looked_ns = now_ns
        return self._idle_ns >= HUNG_NS
