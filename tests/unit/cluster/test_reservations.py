"""What a replica reserves with Ray: for all processes of its worker."""

from typing import Any

import pytest

from pdserve.cluster.app import _pool_options
from pdserve.settings import from_tree


@pytest.mark.parametrize(
    ("tree", "reserved"),
    [
        ({}, {"num_cpus": 0.0}),
        ({"model": {"device": "cuda"}}, {"num_cpus": 0.0, "num_gpus": 1}),
        (
            {"model": {"device": "cuda"}, "decode": {"tensor_parallel": 4, "cpus": 1.5}},
            {"num_cpus": 6.0, "num_gpus": 4},
        ),
        (
            {"decode": {"tensor_parallel": 2, "gpus": 0.5, "resources": {"rack": 1}}},
            {"num_cpus": 0.0, "num_gpus": 1.0, "resources": {"rack": 1.0}},
        ),
    ],
)
def test_a_replica_reserves_for_all_its_processes(
    tree: dict[str, Any], reserved: dict[str, Any]
) -> None:
    config = from_tree(tree)
    options = _pool_options(config.decode, config)["ray_actor_options"]
    assert options == {"resources": {}, **reserved}
