"""The router's core in a small cluster to which everything happens, in any order.

``FakeCluster.check`` holds after every step: the books agree with themselves, nobody is lost or
counted twice, no request runs in two places, no worker is left idle while somebody could go there.
At the end everything is let run out, and every reservation is back. Each run has another mode,
another placement and other orders.
"""

from typing import get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from pdserve.messages import Role, ServiceClass
from pdserve.router.duties import Duty
from pdserve.router_config import Placement
from tests.unit.router.fake_cluster import FakeCluster

WORKERS_MAX = 5
CHOICES = st.integers(min_value=0, max_value=10**6)
PLACEMENTS = ("late", *get_args(Placement))
"""Late ones are what is in use: as many examples as of two others."""


class RouterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster()

    @initialize(
        mode=st.sampled_from(("disaggregated", "aggregated", "auto")),
        placement=st.sampled_from(PLACEMENTS),
        policy=st.sampled_from(("skip_join", "skip_join", "fcfs", "srpt", "mlfq")),
        decode_policy=st.sampled_from(("gated", "fcfs", "mlfq", "oracle")),
        ttft_slo_ms=st.sampled_from((None, None, 600.0)),
    )
    def start(self, **settings: object) -> None:
        self.cluster = FakeCluster(**settings)

    def _worker(self, choice: int) -> str:
        return sorted(self.cluster.workers)[choice % len(self.cluster.workers)]

    def _has_workers(self) -> bool:
        return bool(self.cluster.workers)

    @precondition(lambda self: len(self.cluster.workers) < WORKERS_MAX)
    @rule(role=st.sampled_from(Role))
    def join(self, role: Role) -> None:
        self.cluster.join(role)

    @rule(
        tokens=st.sampled_from((5, 32, 70, 200, 350, 500)),
        max_tokens=st.sampled_from((1, 3, 40)),
        document=st.sampled_from("ab"),
        deadline_ms=st.sampled_from((0, 30, 10**6)),
        tenant=st.sampled_from("uv"),
        service_class=st.sampled_from(ServiceClass),
    )
    def submit(
        self,
        tokens: int,
        max_tokens: int,
        document: str,
        deadline_ms: int,
        tenant: str,
        service_class: ServiceClass,
    ) -> None:
        self.cluster.submit(
            tokens, max_tokens, document, deadline_ms, tenant=tenant, service_class=service_class
        )

    @precondition(lambda self: self.cluster.lost)
    @rule()
    def submit_again(self) -> None:
        self.cluster.submit_again()

    @precondition(lambda self: self.cluster.wanted)
    @rule(choice=CHOICES)
    def cancel(self, choice: int) -> None:
        wanted = sorted(self.cluster.wanted)
        self.cluster.cancel(wanted[choice % len(wanted)])

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def obey(self, choice: int) -> None:
        self.cluster.obey(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def work(self, choice: int) -> None:
        self.cluster.work(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def hear(self, choice: int) -> None:
        self.cluster.hear(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES, rounds=st.integers(min_value=1, max_value=20))
    def run(self, choice: int, rounds: int) -> None:
        """One worker at full speed."""
        worker = self._worker(choice)
        for _ in range(rounds):
            self.cluster.obey(worker)
            self.cluster.work(worker)
            self.cluster.hear(worker)

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def fail(self, choice: int) -> None:
        self.cluster.fail(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def drain(self, choice: int) -> None:
        self.cluster.drain(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES, duty=st.sampled_from(Duty))
    def switch(self, choice: int, duty: Duty) -> None:
        self.cluster.switch(self._worker(choice), duty)

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def kill(self, choice: int) -> None:
        self.cluster.kill(self._worker(choice))

    @precondition(_has_workers)
    @rule(choice=CHOICES)
    def reconnect(self, choice: int) -> None:
        self.cluster.reconnect(self._worker(choice))

    @rule(elapsed_ms=st.sampled_from((1, 20, 200)))
    def pass_time(self, elapsed_ms: int) -> None:
        self.cluster.pass_time(elapsed_ms)

    @invariant()
    def holds(self) -> None:
        self.cluster.check()

    def teardown(self) -> None:
        self.cluster.settle()


_SETTINGS = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
RouterMachine.TestCase.settings = _SETTINGS
TestRouter = RouterMachine.TestCase


class LongRouterMachine(RouterMachine):
    pass


LongRouterMachine.TestCase.settings = settings(
    _SETTINGS, max_examples=1000, stateful_step_count=100
)
TestRouterForLong = pytest.mark.slow(LongRouterMachine.TestCase)
