"""The autoscaler as a task of the router's process: it looks, decides, remembers, and wakes.

What it wants reaches Serve by way of the workers: each asks for it, and reports it as its metric
(``cluster.autoscaling``). A pool without workers has nobody to report, so it is *woken*: a call to
it waits at Serve's handle, for which Serve starts a replica at once.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from pdserve.config import ClusterConfig
from pdserve.errors import PdserveError
from pdserve.messages import Role
from pdserve.router.scaling import Autoscaler, Bounds, Decision, Observation, Plan

log = logging.getLogger("pdserve.autoscaling")

OBSERVATIONS_MAX = 1_200
"""Twenty minutes, at one a second."""

ASKED_S = 2.0
"""How long somebody counts who asked for the model while no worker was there."""


def plan_of(config: ClusterConfig) -> Plan:
    pools = {Role.DECODE: config.decode}
    if config.router.mode != "aggregated":
        pools = {Role.PREFILL: config.prefill, **pools}
    settings = config.autoscaling
    return Plan(
        settings=settings,
        bounds={role: Bounds(pool.replicas, pool.replicas_most) for role, pool in pools.items()},
        ttft_ms=settings.ttft_ms or config.router.ttft_slo_ms,
        tpot_ms=settings.tpot_ms or config.router.tpot_slo_ms,
    )


class Scaler:
    def __init__(
        self,
        plan: Plan,
        *,
        observe: Callable[[], Observation | None],
        wake: Callable[[Role], Awaitable[object]],
    ) -> None:
        """
        Args:
            observe: the router, now; None while another router leads, which decides then.
            wake: a call to a worker of the pool, which returns when there is one.
        """
        self._plan = plan
        self._observe = observe
        self._wake = wake
        self._autoscaler = Autoscaler(plan)
        self._observations: deque[Observation] = deque(maxlen=OBSERVATIONS_MAX)
        self._task: asyncio.Task[None] | None = None
        self._waking: dict[Role, asyncio.Task[None]] = {}
        self._asked_ms: int | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        for task in (self._task, *self._waking.values()):
            if task is not None:
                task.cancel()

    def asked(self) -> None:
        """Somebody needs to know the model, and no worker has come to say."""
        seen = self._observe()
        self._asked_ms = None if seen is None else seen.at_ms

    def wants(self) -> dict[str, int]:
        """By pool; empty while it has not seen enough, and in a dry run."""
        if self._plan.settings.dry_run:
            return {}
        wanted = {role.value: self._autoscaler.wanted(role) for role in self._plan.bounds}
        return {role: count for role, count in wanted.items() if count is not None}

    def explain(self) -> dict[str, Any]:
        """Plain values, for ``pdserve autoscaler explain``."""
        return {
            "dry_run": self._plan.settings.dry_run,
            "ttft_ms": self._plan.ttft_ms,
            "tpot_ms": self._plan.tpot_ms,
            "pools": [
                {
                    "pool": role.value,
                    "least": bounds.least,
                    "most": bounds.most,
                    "wanted": self._autoscaler.wanted(role),
                    "start_s": round(self._autoscaler.start_s(role), 1),
                }
                for role, bounds in self._plan.bounds.items()
            ],
            "latest": [asdict(decision) for decision in self._autoscaler.latest],
            "changes": [asdict(decision) for decision in self._autoscaler.changes],
            "now_ms": self._observations[-1].at_ms if self._observations else 0,
        }

    def observations(self) -> dict[str, Any]:
        """What it has seen, oldest first: to be played through another policy."""
        return {"observations": [asdict(seen) for seen in self._observations]}

    async def _run(self) -> None:
        while True:
            try:
                self._look()
            except PdserveError:
                log.exception("the autoscaler cannot look")
            await asyncio.sleep(self._plan.settings.metrics_interval_s)

    def _look(self) -> None:
        seen = self._observe()
        if seen is None:
            return
        asked_ms = self._asked_ms
        if asked_ms is not None and seen.at_ms - asked_ms <= ASKED_S * 1000:
            seen = replace(seen, live=seen.live + 1)
        self._observations.append(seen)
        for decision in self._autoscaler.decide(seen):
            if decision.changes:
                log.info("%s", _line(decision))
        self._wake_sleepers(seen)

    def _wake_sleepers(self, seen: Observation) -> None:
        workers = {Role.PREFILL: seen.prefill.workers, Role.DECODE: seen.decode.workers}
        for role in self._plan.bounds:
            task = self._waking.get(role)
            asleep = seen.live > 0 and workers[role] == 0 and bool(self._autoscaler.wanted(role))
            if asleep and (task is None or task.done()):
                self._waking[role] = asyncio.create_task(self._wake_one(role))

    async def _wake_one(self, role: Role) -> None:
        try:
            await self._wake(role)
        except Exception as error:  # Ray's; the next look tries again
            log.warning("cannot wake %s: %s", role, error)


def _line(decision: Decision) -> str:
    return f"{decision.pool}: {decision.before} to {decision.wanted}: {decision.why}"


def replayed(plan: Plan, observations: list[Mapping[str, Any]]) -> list[Decision]:
    """What a policy would have changed, had it seen this. The pools stay as they were seen: what
    more workers would have done to the load is the simulator's to say.

    Raises:
        KeyError, TypeError: it is no recording of observations.
    """
    from pdserve.router.scaling import DecodeSignals, PrefillSignals

    autoscaler = Autoscaler(plan)
    for tree in observations:
        fields = {
            **tree,
            "prefill": PrefillSignals(**tree["prefill"]),
            "decode": DecodeSignals(**tree["decode"]),
        }
        autoscaler.decide(Observation(**fields))
    return list(autoscaler.changes)
