"""Every order and every placement under the core, in a cluster where everything happens."""

from dataclasses import replace
from random import Random
from typing import get_args

import pytest

from pdserve.messages import Role
from pdserve.router.core import RouterCore
from pdserve.router.entry import Entry
from pdserve.router_config import Placement, QueuePolicy
from tests.unit.router import build
from tests.unit.router.entries import contents
from tests.unit.router.fake_cluster import FakeCluster
from tests.unit.router.test_router_storm import WEIGHTS

STEPS = 600


class AnyOrder(FakeCluster):
    """Without the promise that is late binding's alone: no idle worker while somebody waits."""

    def __init__(self, policy: QueuePolicy, placement: Placement) -> None:
        super().__init__()
        config = replace(build.settings(waiting_max=8), policy=policy, placement=placement)
        self.core = RouterCore(config, unix_zero_ms=0)

    def check(self) -> None:
        self.core.state.check()
        for order in self.core.state.lines.all():
            order.check()


@pytest.mark.parametrize(
    ("policy", "placement"),
    [(policy, "late") for policy in get_args(QueuePolicy)]
    + [("srpt", placement) for placement in get_args(Placement)]
    + [("fastserve", "least_work"), ("skip_join", "preble")],
)
def test_every_request_ends_and_no_order_remembers_it(
    policy: QueuePolicy, placement: Placement
) -> None:
    chance = Random(7)
    cluster = AnyOrder(policy, placement)
    for role in (*Role, *Role):
        cluster.join(role)
    for act in chance.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=STEPS):
        act(cluster, chance)
        cluster.check()
    cluster.settle()
    assert cluster.core.state.counters["finished"] > 0
    for order in cluster.core.state.lines.all():
        assert len(order) == 0
        assert not any(isinstance(part, Entry) for part in contents(order))
