"""A worker that knows its own speed takes a prefix from a disk where that is sooner, else computes
it; the answer is the same either way."""

import itertools

import pytest

from pdserve.clock import MS
from pdserve.kvstore.path_speed import PathCost
from tests.unit.engine.rig import Rig, plain, prompt, request


@pytest.mark.parametrize(
    ("disk", "restored"),
    [(PathCost(1e-6, 1e12), 28), (PathCost(100.0, 1e6), 0)],
)
def test_a_prefix_on_a_disk_is_taken_where_that_is_sooner(disk: PathCost, restored: int) -> None:
    ticks = itertools.count()
    rig = Rig(clock=lambda: next(ticks) * MS)
    rig.prefill("p0")
    second = rig.prefill("p1")
    rig.decode()
    rig.send(request("first", tokens=prompt(30)))
    rig.run()
    rig.p_store.below, rig.p_store.below_keys = disk, set(rig.p_store.blocks)
    rig.send(request("other", tokens=tuple(reversed(prompt(20)))), prefill="p1")  # learns its speed
    rig.run()
    again = request("again", tokens=prompt(30))
    rig.send(again, prefill="p1")
    rig.run()
    assert rig.tokens("again") == plain(again)
    counters = second.load().counters
    assert counters["prompt_tokens_cached_store"] == restored
    assert counters["prefixes_fetched"] == (restored > 0)
    assert counters["prefixes_recomputed"] == (restored == 0)
    rig.check_idle()
