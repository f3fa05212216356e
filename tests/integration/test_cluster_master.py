"""Two hosts and, without being asked for, a master: what one of them has the other one gets, and
the answer is the same."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdserve.cluster.kv_master import master_report, masters_in
from pdserve.cluster.kv_stores import stores_of
from pdserve.engine.restorer import TRIED_AGAIN_EVERY
from pdserve.kvstore.masters.protocol import MasterReport
from tests.integration.harness import running, settings, wait_for
from tests.integration.store_masters import until
from tests.integration.test_cluster_two_hosts import two_hosts
from tests.models.reference import reference_tokens

__all__ = ["two_hosts"]

OUTPUT_TOKENS = 8
HOSTS = {"test-host-of-prefill", "test-host-of-decode"}


@pytest.mark.slow
def test_a_prefix_comes_from_the_host_that_a_master_names(
    two_hosts: str, small_model: Path, tmp_path: Path
) -> None:
    chance = random.Random(5)
    prompt, other = ([chance.randrange(20, 40_000) for _ in range(length)] for length in (700, 900))
    pools = {"threads": 1, "pool_blocks": 64}  # the second prompt takes the first one's place
    config = settings(
        small_model,
        model={"dtype": "float32"},
        prefill={**pools, "resources": {"prefill_host": 0.01}},
        decode={**pools, "resources": {"decode_host": 0.01}},
        tcp=True,
    )
    (expected,) = reference_tokens(small_model, [prompt], OUTPUT_TOKENS, scratch=tmp_path)
    with running(config, ray_address=two_hosts) as cluster, stores_of(cluster.url, ()) as stores:
        assert cluster.tokens(prompt, OUTPUT_TOKENS) == expected
        masters = masters_in(store.admin.report() for store in stores)
        assert masters, "auto: there are two hosts"
        (near,) = (store for store in stores if store.host == "test-host-of-prefill")
        (far,) = (store for store in stores if store.host == "test-host-of-decode")
        known = until(lambda: whole(masters), "a whole index")
        assert {member.address.host for member in known.members} == HOSTS
        # Whether a prefix is fetched or computed is a question of price, and one that is declined
        # is tried now and then all the same: a few askings see it fetched, whatever either takes.
        for _ in range(2 * TRIED_AGAIN_EVERY):
            cluster.tokens(other, OUTPUT_TOKENS)
            near.admin.evict_all()
            until(lambda: near.admin.report().stat.slots_committed == 0 or None, "its emptiness")
            until(lambda: located_at(masters, near.name) == 0 or None, "that the master knows")
            until(lambda: located_at(masters, far.name) or None, "what the other one has")
            assert cluster.tokens(prompt, OUTPUT_TOKENS) == expected
            if cluster.counter("prefill", "blocks_elsewhere") > 0:
                break
        wait_for(
            "blocks of the other host",
            lambda: cluster.counter("prefill", "blocks_elsewhere") > 0,
        )


def whole(masters: Sequence[str]) -> MasterReport | None:
    report = master_report(masters)
    return report if report is not None and report.is_whole and report.blocks else None


def located_at(masters: Sequence[str], name: str) -> int | None:
    report = master_report(masters)
    if report is None:
        return None
    return sum(member.blocks for member in report.members if member.store_id == name)
