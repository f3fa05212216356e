"""Prefill on one host, decode on another: two raylets, two store nodes, and only TCP between."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pdserve.cluster.local import OBJECT_STORE_BYTES
from tests.integration.harness import TestCluster, running, settings
from tests.models.reference import reference_tokens

OUTPUT_TOKENS = 16


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster whose two nodes take each other for different machines."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    hosts = Cluster()
    for name in ("prefill", "decode"):
        monkeypatch.setenv("PDSERVE_HOST_ID", f"test-host-of-{name}")
        hosts.add_node(
            num_cpus=2,
            resources={f"{name}_host": 1},
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
    monkeypatch.delenv("PDSERVE_HOST_ID")
    try:
        yield hosts.address
    finally:
        ray.shutdown()
        hosts.shutdown()


@pytest.mark.slow
def test_blocks_cross_hosts_over_tcp_and_the_tokens_are_right(
    two_hosts: str, small_model: Path, tmp_path: Path
) -> None:
    chance = random.Random(3)
    prompts = [
        [chance.randrange(20, 40_000) for _ in range(length)] for length in (5, 33, 160, 700, 1500)
    ]
    pools = {"threads": 1, "pool_blocks": 512}
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill={**pools, "resources": {"prefill_host": 0.01}},
        decode={**pools, "resources": {"decode_host": 0.01}},
        tcp=True,
    )
    expected = reference_tokens(small_model, prompts, OUTPUT_TOKENS, scratch=tmp_path)
    with running(config, ray_address=two_hosts) as cluster:
        assert [cluster.tokens(prompt, OUTPUT_TOKENS) for prompt in prompts] == expected
        _assert_remote(cluster, blocks=sum(-(-len(prompt) // 16) for prompt in prompts))


def _assert_remote(cluster: TestCluster, *, blocks: int) -> None:
    prefill, decode = cluster.workers("prefill")[0], cluster.workers("decode")[0]
    assert prefill["pid"] != decode["pid"]
    assert prefill["host"] != decode["host"]
    assert prefill["counters"]["remote_bytes"] == blocks * 2 * 2 * 2 * 16 * 16 * 4
    assert os.getpid() not in (prefill["pid"], decode["pid"])
