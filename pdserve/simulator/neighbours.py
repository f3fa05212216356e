"""Workers of one host, which slow each other down: they share its caches, memory and cores.

Everything takes a worker ``contention`` times as long while all others of its host work, and the
less longer, the fewer of them do:

    pace = 1 + (contention − 1) · working others / others

What is under way when a neighbour begins or ends goes on at its old pace to the end of its step.
"""

from collections.abc import Callable
from typing import Any

from pdserve.simulator.surroundings import Action
from pdserve.simulator.worker import Worker


class Neighbours:
    """One host's."""

    def __init__(self, contention: float, at: Callable[[int, Action, Any], None]) -> None:
        """``at``: at that instant, call that with that."""
        assert contention >= 1
        self._contention = contention
        self._at = at
        self._own_slow: dict[Worker, float] = {}  # without the others
        self._look_ns: int | None = None  # when it will look at them all

    def add(self, worker: Worker, now_ns: int) -> None:
        self._own_slow[worker] = worker.engine.slow
        worker.engine.on_turn = self._look_soon
        self._look_soon(now_ns)

    def remove(self, worker: Worker, now_ns: int) -> None:
        worker.engine.slow = self._own_slow.pop(worker)
        worker.engine.on_turn = None
        self._look_soon(now_ns)

    def become_slow(self, worker: Worker, slow: float, now_ns: int) -> None:
        """For a reason of its own."""
        self._own_slow[worker] = slow
        self._look_soon(now_ns)

    def _look_soon(self, now_ns: int) -> None:
        """After what happens now: the worker that says so is in the midst of it."""
        if self._look_ns is None or now_ns < self._look_ns:
            self._look_ns = now_ns
            self._at(now_ns, self._look, None)

    def _look(self, now_ns: int, _: None) -> None:
        self._look_ns = None
        others = len(self._own_slow) - 1
        working = sum(worker.engine.works for worker in self._own_slow)
        for worker, own_slow in self._own_slow.items():
            share = (working - worker.engine.works) / others if others else 0.0
            slow = own_slow * (1 + (self._contention - 1) * share)
            if slow != worker.engine.slow:
                worker.become_slow(slow, now_ns)
