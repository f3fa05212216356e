"""Where there are many workers, short cuts find what a look at all of them finds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS
from pdserve.ids import RequestId
from pdserve.router import fleet as fleet_module
from pdserve.router.fleet import EXPLAINED_WORKERS_MAX, Fleet
from pdserve.router.placement import Choice, Deferred, place
from pdserve.router.worker import Held
from pdserve.router_config import RouterConfig
from tests.unit.router.build import BLOCK_TOKENS, hello
from tests.unit.router.entries import COSTS, entry

MANY = EXPLAINED_WORKERS_MAX + 2

BUSY_MS = st.lists(st.sampled_from([0, 5, 20, 20, 400]), min_size=MANY - 1, max_size=MANY - 1)
PROMPT_TOKENS = 100  # less than a chunk: one more prompt may be sent ahead of time


def _fleet(busy_ms: list[int], measured_ms: dict[int, int]) -> Fleet:
    """Prefill workers that are busy for so long, some of another speed than expected, and one for
    decode."""
    fleet = Fleet(RouterConfig(), COSTS)
    for slot, busy in enumerate(busy_ms):
        worker = fleet.add(hello(f"p{slot:02}", chunk_tokens=128), 0)
        worker.free_at_ns = busy * MS
        held = Held(PROMPT_TOKENS, COSTS.prefill_ns(PROMPT_TOKENS), is_new=True)
        worker.prompts = {RequestId(f"x{slot}"): held} if busy else {}
        if slot in measured_ms:
            worker.correction.observe(1000 * MS, measured_ms[slot] * MS)
        fleet.changed(worker)
    fleet.add(hello("d0"), 0)
    fleet.check()
    return fleet


@given(BUSY_MS, st.integers(0, 500))
def test_who_is_open_soonest_and_who_else(busy_ms: list[int], by_ms: int) -> None:
    fleet = _fleet(busy_ms, {})
    times_ns = sorted(fleet.open_ns.tolist()) if fleet.soonest_open_ns() < math.inf else [math.inf]
    assert fleet.soonest_open_ns() == times_ns[0]
    assert fleet.next_soonest_open_ns() == times_ns[1]
    by_ns = by_ms * MS
    is_open = [slot for slot, at_ns in enumerate(fleet.open_ns.tolist()) if at_ns <= by_ns]
    assert fleet.open_slots(by_ns).tolist() == is_open
    for slot in range(MANY):
        another = any(other != slot for other in is_open)
        assert fleet.is_another_open_by(by_ns, but=slot) == another
    fleet.check()


@given(
    BUSY_MS,
    st.dictionaries(st.integers(0, MANY - 2), st.sampled_from([500, 1500, 2000])),
    st.integers(1, 300),
    st.integers(0, 30),
    st.none() | st.integers(0, MANY - 2),
)
def test_pricing_those_that_are_open_is_pricing_all(
    busy_ms: list[int], measured_ms: dict[int, int], tokens: int, now_ms: int, only: int | None
) -> None:
    fleet = _fleet(busy_ms, measured_ms)
    one = entry("r", tokens)

    def placed() -> Choice | Deferred | None:
        hits = fleet.hits(())
        return place(
            fleet, one, hits, block_tokens=BLOCK_TOKENS, tpot_slo_ns=None, now_ns=now_ms * MS,
            only=None if only is None else fleet.at(only),
        )  # fmt: skip

    few = placed()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_module, "EXPLAINED_WORKERS_MAX", MANY)  # all are priced, to be told of
        all_ = placed()
    assert (few is None) == (all_ is None)
    if isinstance(few, Choice):
        assert isinstance(all_, Choice)
        assert few.prefill is all_.prefill
        assert few.decode is all_.decode
        assert (few.price_ns, few.work_ns, few.reason) == (all_.price_ns, all_.work_ns, all_.reason)
        assert few.others == ()
