"""Fetch or recompute: what a price says of blocks that only another host's store has. A token is a
millisecond to compute, and 23 microseconds to fetch."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.clock import MS
from pdserve.ids import RequestId
from pdserve.router.costs import CostModel, MoveCost
from pdserve.router.entry import Entry
from pdserve.router.fleet import Fleet
from pdserve.router.placement import (
    DEFER_MAX_NS,
    Choice,
    own_costs,
    place,
    supply,
    usable_tokens,
)
from pdserve.router.prefix_index import Hits
from pdserve.router.worker import Held
from pdserve.router_config import RouterConfig
from tests.unit.router.build import BLOCK_TOKENS, hello
from tests.unit.router.entries import COSTS, entry

CHUNK_TOKENS = 128
SLOW = replace(COSTS, handoff=MoveCost(fixed_s=0.081, bytes_per_s=1e15))
"""To fetch five blocks takes a millisecond longer than to compute them."""


def _fleet(*hosts: str, costs: CostModel = COSTS, fetches: bool = True) -> Fleet:
    """A prefill worker on each of these hosts, and one to decode."""
    fleet = Fleet(RouterConfig(), costs)
    for index, host in enumerate(hosts):
        fleet.add(replace(hello(f"p{index}", host=host), fetches=fetches), 0)
    fleet.add(replace(hello("d0", host="h9"), fetches=fetches), 0)
    return fleet


def _entry(tokens: int, stored_blocks: int, *, computed_tokens: int = 0) -> Entry:
    one = entry("r", tokens)
    one.stored_blocks, one.computed_tokens = stored_blocks, computed_tokens
    return one


def _place(fleet: Fleet, one: Entry, hits: Hits) -> Choice:
    choice = place(fleet, one, hits, block_tokens=BLOCK_TOKENS, tpot_slo_ns=None, now_ns=0)
    assert isinstance(choice, Choice)
    return choice


def test_a_free_worker_fetches_what_a_busy_one_has() -> None:
    fleet = _fleet("h0", "h1")
    fleet.at(1).free_at_ns = 60 * MS
    fleet.changed(fleet.at(1))
    choice = _place(fleet, _entry(100, 5), ((0, 0b01), (5, 0b10)))
    fetch_ns = COSTS.handoff.time_ns(80 * COSTS.kv_token_bytes)
    assert choice.prefill.id == "p0"
    assert choice.reason == "first done, fetches from another host"
    assert (choice.cached_tokens, choice.uncached_tokens) == (80, 20)
    assert choice.price_ns == choice.work_ns == 20 * MS + fetch_ns


def test_who_has_it_is_cheaper_than_who_fetches_it() -> None:
    choice = _place(_fleet("h0", "h1"), _entry(100, 5), ((0, 0b01), (5, 0b10)))
    assert (choice.prefill.id, choice.reason) == ("p1", "first done")
    assert choice.price_ns == 20 * MS


def test_of_several_that_are_open_the_best_and_not_the_best_of_all() -> None:
    """One that computes more than a chunk takes nothing, and would be done with this one first:
    the others' hosts have less of it, and fetching takes longer than its wait."""
    fleet = _fleet("h0", "h1", "h2", costs=SLOW)
    fleet.at(1).correction.observe(10**10, 2 * 10**10)
    fleet.at(2).prompts = {RequestId("x"): Held(CHUNK_TOKENS + 1, 10 * MS, is_new=True)}
    fleet.at(2).free_at_ns = 10 * MS
    for slot in (1, 2):
        fleet.changed(fleet.at(slot))
    one, hits = _entry(100, 5), ((0, 0b011), (5, 0b100))
    one.deferred_ns = -DEFER_MAX_NS  # it has waited for that long enough
    assert _place(fleet, one, hits).prefill.id == "p0"


def test_what_is_sooner_computed_is_computed() -> None:
    choice = _place(_fleet("h0", costs=SLOW), _entry(100, 5), ((0, 0b01),))
    assert (choice.cached_tokens, choice.price_ns) == (0, 100 * MS)
    equal = replace(SLOW, handoff=MoveCost(fixed_s=0.080, bytes_per_s=1e18))
    choice = _place(_fleet("h0", costs=equal), _entry(100, 5), ((0, 0b01),))
    assert choice.cached_tokens == 80  # as soon, and its worker is free meanwhile


def test_how_slow_a_worker_computes_says_nothing_of_how_it_fetches() -> None:
    fleet = _fleet("h0", "h1")
    fleet.at(0).correction.observe(10**10, 2 * 10**10)
    fleet.changed(fleet.at(0))
    fleet.settle()
    fetch_ns = COSTS.handoff.time_ns(80 * COSTS.kv_token_bytes)
    costs_ns = own_costs(fleet, _entry(100, 5), ((0, 0b01), (5, 0b10)), BLOCK_TOKENS)
    assert costs_ns[0] - fetch_ns == pytest.approx(20 * MS * fleet.at(0).correction.factor)
    assert costs_ns[1] == 20 * MS


def test_they_fetch_where_everybody_does() -> None:
    fleet = _fleet("h0", "h1")
    assert fleet.fetches
    older = fleet.add(hello("p9", host="h2"), 0)
    assert not fleet.fetches
    fleet.remove(older)
    assert fleet.fetches
    assert not _fleet("h0", fetches=False).fetches


@given(
    tokens=st.integers(1, 400),
    own_blocks=st.integers(0, 26),
    stored_blocks=st.integers(0, 26),
    computed_tokens=st.integers(0, 399),
    fixed_ms=st.integers(0, 300),
    token_us=st.integers(0, 2000),
)
def test_it_is_the_sooner_of_the_two(
    tokens: int,
    own_blocks: int,
    stored_blocks: int,
    computed_tokens: int,
    fixed_ms: int,
    token_us: int,
) -> None:
    bytes_per_s = COSTS.kv_token_bytes * 1e6 / token_us if token_us else 1e18
    costs = replace(COSTS, handoff=MoveCost(fixed_s=fixed_ms / 1000, bytes_per_s=bytes_per_s))
    one = _entry(tokens, stored_blocks, computed_tokens=min(computed_tokens, tokens - 1))
    own = usable_tokens(one, own_blocks, BLOCK_TOKENS)
    stored = usable_tokens(one, stored_blocks, BLOCK_TOKENS)
    computed_ns = (tokens - own) * MS
    fetched_ns = fixed_ms * MS + (stored - own) * token_us * 1000 + (tokens - stored) * MS
    chosen = supply(_fleet("h0", costs=costs), one, own_blocks, BLOCK_TOKENS)
    if stored > own and fetched_ns < computed_ns - 1:
        assert chosen.work_ns + chosen.fetch_ns == pytest.approx(fetched_ns, abs=1)
        assert chosen.cached_tokens == stored
    elif stored <= own or fetched_ns > computed_ns + 1:
        assert (chosen.cached_tokens, chosen.work_ns, chosen.fetch_ns) == (own, computed_ns, 0)


@given(
    held=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    busy_ms=st.lists(st.integers(0, 300), min_size=6, max_size=6),
    more_blocks=st.integers(0, 12),
    tokens=st.integers(1, 300),
)
def test_no_worker_would_be_done_sooner(
    held: list[int], busy_ms: list[int], more_blocks: int, tokens: int
) -> None:
    """By the definition, for each by itself. All are open, so that nobody is waited for."""
    fleet = _fleet(*(f"h{index}" for index in range(len(held))))
    one = _entry(tokens, max(held) + more_blocks)
    done_ns, bits = [], dict[int, int]()
    for slot, blocks in enumerate(held):
        bits[blocks] = bits.get(blocks, 0) | 1 << slot
        fleet.at(slot).free_at_ns = busy_ms[slot] * MS
        fleet.changed(fleet.at(slot))
        chosen = supply(fleet, one, blocks, BLOCK_TOKENS)
        done_ns.append(busy_ms[slot] * MS + chosen.work_ns + chosen.fetch_ns)
    choice = _place(fleet, one, tuple(sorted(bits.items())))
    assert choice.price_ns == min(done_ns) == done_ns[choice.prefill.slot]
    assert choice.price_ns == busy_ms[choice.prefill.slot] * MS + choice.work_ns
