"""Pools that grow and shrink in the simulation, by the autoscaler of production.

It looks as often as the live one. A worker it wants is there after ``start_ns``, and is paid for
from the beginning; one that is still starting is the first to be given up. One that leaves does as
a live one: it says that it drains, finishes the prompts it has begun, hands the others back, parks
its streams, and is gone when nothing is left.
"""

from collections.abc import Callable
from typing import Any

from pdserve.clock import S
from pdserve.ids import WorkerId
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt, Role
from pdserve.router.core import RouterCore
from pdserve.router.scaling import Autoscaler
from pdserve.simulator.settings import Autoscaling
from pdserve.simulator.worker import Worker


class Pools:
    def __init__(
        self,
        scaling: Autoscaling,
        core: RouterCore,
        workers: dict[WorkerId, Worker],
        join: Callable[[Role], None],
        retire: Callable[[Worker], None],
        at: Callable[[int, Callable[[int, Any], None], object], None],
    ) -> None:
        """
        Args:
            workers: all that live; read here, and changed by ``join`` and ``retire``.
            at: at that instant, call that with that.
        """
        self.every_ns = round(scaling.plan.settings.metrics_interval_s * S)
        self.billed_ns = dict.fromkeys(Role, 0)
        self._start_ns = scaling.start_ns
        self._autoscaler = Autoscaler(scaling.plan)
        self._roles = list(scaling.plan.bounds)
        self._core = core
        self._workers = workers
        self._join = join
        self._retire = retire
        self._at = at
        self._starting: dict[Role, list[int]] = {role: [] for role in Role}  # numbers, in order
        self._start_count = 0
        self._looked_ns = 0
        self._most = dict.fromkeys(Role, 0)

    def look(self, now_ns: int) -> None:
        self._bill(now_ns)
        self._autoscaler.decide(self._core.observation(now_ns))
        for role in self._roles:
            wanted = self._autoscaler.wanted(role)
            if wanted is not None:
                self._follow(role, wanted, now_ns)
        for worker in [worker for worker in self._workers.values() if worker.draining]:
            self._empty(worker, now_ns)

    def counters(self, now_ns: int) -> dict[str, int]:
        """Time of workers, and how often a number changed."""
        self._bill(now_ns)
        changes = self._autoscaler.changes
        found = {"autoscaling_changes": len(changes)}
        for role in Role:
            found[f"autoscaling_{role}_worker_ms"] = self.billed_ns[role] * 1000 // S
            found[f"autoscaling_{role}_most"] = self._most[role]
        return found

    def _bill(self, now_ns: int) -> None:
        passed_ns, self._looked_ns = now_ns - self._looked_ns, now_ns
        for role in Role:
            there = sum(worker.hello.role is role for worker in self._workers.values())
            count = there + len(self._starting[role])
            self.billed_ns[role] += passed_ns * count
            self._most[role] = max(self._most[role], count)

    def _follow(self, role: Role, wanted: int, now_ns: int) -> None:
        there = [w for w in self._workers.values() if w.hello.role is role and not w.draining]
        starting = self._starting[role]
        while len(there) + len(starting) < wanted:
            self._start_count += 1
            starting.append(self._start_count)
            self._at(now_ns + self._start_ns, self._started, (role, self._start_count))
        while len(there) + len(starting) > wanted and starting:
            starting.pop()
        # Who holds least has least to hand over.
        there.sort(key=lambda worker: (self._held(worker), worker.hello.worker))
        for worker in there[: max(0, len(there) - wanted)]:
            worker.drain(now_ns)

    def _started(self, now_ns: int, which: tuple[Role, int]) -> None:
        role, number = which
        if number in self._starting[role]:
            self._bill(now_ns)
            self._starting[role].remove(number)
            self._join(role)

    def _held(self, worker: Worker) -> int:
        known = self._core.state.fleet.get(worker.hello.worker)
        return 0 if known is None else len(known.held)

    def _empty(self, worker: Worker, now_ns: int) -> None:
        """What the live worker does by itself."""
        known = self._core.state.fleet.get(worker.hello.worker)
        if known is None or not known.held:
            self._retire(worker)
            return
        for request in known.held:
            entry = self._core.state.entries.get(request)
            if entry is None:
                continue
            begun = entry.phase is Phase.PREFILLING and entry.begun
            if entry.phase is Phase.DECODING or (entry.prefill == known.id and not begun):
                worker.receive(now_ns, Preempt(request, entry.request.attempt, entry.phase))
