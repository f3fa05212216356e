"""Blocks of a node that is emptied enter a full one: what goes for them is worth less, and no more
goes than must. Against any history of a target, with pins, shares and readers' claims."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.entering import may_enter
from pdserve.kvstore.eviction import TURNS, EvictionName
from pdserve.kvstore.slot_states import Past, SlotState
from tests.unit.kvstore.test_core import chain, commit, put

SLOTS = 8


class Target:
    def __init__(
        self, eviction: EvictionName = "lru", weights: Mapping[str, float] | None = None
    ) -> None:
        self.core = StoreCore(SLOTS, eviction=eviction, shares=weights, hard_pins_max=SLOTS)
        self.owner = self.core.connect("w")

    def put(self, name: str, count: int, tenant: str = "") -> None:
        grant = self.core.reserve(self.owner, chain(name, count), 0, tenant=tenant)
        if grant.write:
            commit(self.core, self.owner, grant)

    def enter(self, keys: Sequence[BlockKey], pasts: Sequence[Past], tenant: str = "") -> int:
        """How many of the chain are there then."""
        grant = self.core.reserve(
            self.owner, keys, 0, tenant=tenant, between_tiers=True, pasts=pasts
        )
        if grant.write:
            commit(self.core, self.owner, grant)
        self.core.check()
        return self.core.prefix_count(keys)

    @property
    def uses(self) -> int:
        return self.core.slots.uses

    def now(self, turn: int = 0) -> Past:
        """Of a block that is used later than all that are here."""
        self.let_time_pass()
        return Past(self.uses, turn)

    def let_time_pass(self) -> None:
        self.core.slots.unpin([])

    def there(self, name: str, count: int) -> int:
        return self.core.prefix_count(chain(name, count))

    def past(self, key: BlockKey) -> Past:
        slot = self.core.slots.find(key)
        assert slot is not None
        return self.core.slots.past(slot)


def test_what_is_older_goes_and_what_is_younger_stays() -> None:
    target = Target()
    target.put("old", 4)
    target.let_time_pass()
    between = Past(target.uses, 0)
    target.let_time_pass()
    target.put("young", 4)
    assert target.enter(chain("new", 6), [between] * 6) == 4
    assert (target.there("old", 4), target.there("young", 4)) == (0, 4)
    assert target.past(chain("new", 1)[0]) == between, "as old as it was"
    target.put("next", 4)
    assert (target.there("new", 4), target.there("young", 4)) == (0, 4), "and is the next to go"


def test_of_equals_the_one_that_is_there_stays() -> None:
    target = Target()
    target.put("a", SLOTS)
    past = target.past(chain("a", 1)[0])
    assert target.enter(chain("new", 2), [past] * 2) == 0
    assert target.there("a", SLOTS) == SLOTS


def test_a_block_counts_for_those_that_it_builds_on() -> None:
    target = Target()
    target.put("a", SLOTS)
    young = target.now()
    assert target.enter(chain("new", 3), [Past(0, 0), Past(0, 0), young]) == 3
    assert target.enter(chain("late", 3), [young, Past(0, 0), Past(0, 0)]) == 1


def test_a_prefix_that_is_there_is_used_when_it_was_used_last_anywhere() -> None:
    target = Target()
    target.put("a", 2)
    target.put("b", 6)
    before = target.past(chain("a", 1)[0])
    later = target.now(3)
    assert target.enter(chain("a", 3), [Past(0, 0), later, later]) == 3
    assert [target.past(key) for key in chain("a", 3)] == [before, later, later]
    refused = [Past(0, 0)] * 4
    assert target.enter(chain("a", 4), refused) == 3
    assert [target.past(key) for key in chain("a", 3)] == [before, later, later], "as before"


@pytest.mark.parametrize("hard", [False, True])
def test_no_pinned_block_goes(hard: bool) -> None:
    target = Target()
    target.put("pinned", 5)
    target.put("a", 3)
    assert target.core.pins.pin(chain("pinned", 5), hard=hard) == 5
    assert target.enter(chain("new", 6), [target.now(TURNS - 1)] * 6) == 3
    assert target.there("pinned", 5) == 5


def test_a_tenant_within_its_share_loses_nothing() -> None:
    target = Target(weights={"a": 1, "b": 1, "c": 1})
    target.put("small", 2, "a")
    target.put("big", 6, "b")
    young = [target.now()] * 6
    assert target.enter(chain("new", 6), young, "c") == 4
    assert (target.there("small", 2), target.there("big", 6)) == (2, 2)
    assert target.enter(chain("more", 2), [target.now()] * 2, "c") == 2
    assert target.there("new", 6) == 2, "its own go then"
    uses = {use.tenant: use.slots for use in target.core.slots.order.accounts.uses()}
    assert uses == {"a": 2, "b": 2, "c": 4}


def test_hand_offs_that_wait_for_room_come_first() -> None:
    target = Target()
    target.put("a", SLOTS)
    claim = target.core.claim(target.owner, chain("a", SLOTS))
    assert may_enter(target.core.room, target.core.slots, [target.now()], "") is False
    target.core.release(target.owner, claim.claim)
    assert may_enter(target.core.room, target.core.slots, [target.now()], "") is True
    assert may_enter(target.core.room, target.core.slots, [Past(0, 0)], "") is False
    assert target.there("a", SLOTS) == SLOTS, "a question evicts nothing"


# ── any target ───────────────────────────────────────────────────────────────────────────────────

NAMES = ("a", "b", "c")
doings = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(NAMES), st.integers(1, 5)),
        st.tuples(st.just("claim"), st.sampled_from(NAMES), st.integers(1, 5)),
        st.tuples(st.just("hold"), st.sampled_from(NAMES), st.integers(1, 5)),
        st.tuples(st.just("soft"), st.sampled_from(NAMES), st.integers(1, 2)),
        st.tuples(st.just("hard"), st.sampled_from(NAMES), st.integers(1, 2)),
    ),
    max_size=12,
)
pasts_of_chains = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, TURNS - 1)), min_size=1, max_size=SLOTS + 1
)


@settings(max_examples=300, deadline=None)
@given(
    doings,
    pasts_of_chains,
    st.integers(0, 4),
    st.sampled_from(["lru", "turns"]),
    st.sampled_from([None, {"a": 1.0, "b": 2.0, "d": 1.0}]),
)
def test_whatever_the_target_is_like(
    doings: list[tuple[str, str, int]],
    numbers: list[tuple[int, int]],
    shared: int,
    eviction: EvictionName,
    weights: Mapping[str, float] | None,
) -> None:
    """``shared``: of the chain that comes, blocks that the target may have already."""
    target = Target(eviction, weights)
    core = target.core
    for what, name, count in doings:
        keys = chain(name, count)
        if what == "put":
            target.put(name, count, name)
        elif what in ("claim", "hold"):
            claim = core.claim(target.owner, keys)
            if what == "claim":
                core.release(target.owner, claim.claim)
        else:
            core.pins.pin(keys, hard=what == "hard")
    keys = [*chain("a", min(shared, len(numbers))), *chain("d", 9)][: len(numbers)]
    pasts = [Past(min(use, target.uses), turn) for use, turn in numbers]
    pinned_before = {slot for slot in range(SLOTS) if core.slots[SlotId(slot)].pins}
    soft_before = set(core.slots.order.soft)
    free_before = core.slots.free_count
    present = core.prefix_count(keys)
    worths = [core.slots.worth_of(past) for past in pasts]
    needed = list(accumulate(reversed(worths), max))[::-1]
    evicted: list[tuple[SlotId, tuple[float, int], int]] = []
    evict, order = core.slots.evict_if_idle, core.slots.order
    above: list[int] = []

    def watched(slot: SlotId) -> bool:
        account = order.accounts.number_of(slot)
        above[:] = order.accounts.ranked()[0]
        own = order.accounts.find("d")
        assert not weights or account in above or account == own, "of one within its share"
        evicted.append((slot, core.slots.worth_of(core.slots.past(slot)), account))
        return evict(slot)

    core.slots.evict_if_idle = watched  # type: ignore[method-assign]
    there = target.enter(keys, pasts, "d")
    core.slots.evict_if_idle = evict  # type: ignore[method-assign]
    assert there == present + min(len(keys) - present, free_before + len(evicted))
    for (slot, worth, _), position in zip(
        evicted, range(present + free_before, len(keys)), strict=False
    ):
        assert worth < needed[position], "no block goes for one that is worth no more"
        assert slot not in pinned_before
        assert slot not in soft_before
    for index in range(present, there):
        assert target.past(keys[index]) == pasts[index]
    if there < len(keys) and not weights:
        chain_slots = set(core.slots.lookup(keys))
        leaves = [
            slot
            for slot in map(SlotId, range(SLOTS))
            if core.slots.state(slot) is SlotState.COMMITTED
            and core.slots._is_idle_leaf(slot)
            and slot not in core.slots.order.soft
            and slot not in chain_slots
        ]
        for slot in leaves:
            worth = core.slots.worth_of(core.slots.past(slot))
            # One use has passed since, which ages all alike, but may put one in another bucket.
            assert worth[1] >= needed[there][1] or eviction == "turns", "it might have gone"


def test_two_nodes_in_one_are_what_one_of_their_size_would_have_kept() -> None:
    """Both used in turns; the one that goes leaves what is youngest of both."""
    target, source = Target(), Target()
    for number in range(SLOTS):
        source.put(f"s{number}", 1)
        target.put(f"t{number}", 1)
        while source.uses < target.uses + 2:
            source.let_time_pass()
        while target.uses < source.uses:
            target.let_time_pass()
    for number in reversed(range(SLOTS)):  # what is worth most first
        key = chain(f"s{number}", 1)
        target.enter(key, [source.past(key[0])])
    kept = {name for name in "st" for number in range(SLOTS) if target.there(f"{name}{number}", 1)}
    younger = [number for number in range(SLOTS) if target.there(f"s{number}", 1)]
    assert kept == {"s", "t"}
    assert younger == list(range(SLOTS // 2, SLOTS))
    assert [target.there(f"t{number}", 1) for number in range(SLOTS)] == [0] * 4 + [1] * 4


def test_put_is_not_what_enters() -> None:
    target = Target()
    put(target.core, target.owner, chain("a", SLOTS))
    put(target.core, target.owner, chain("b", 4))
    assert target.there("b", 4) == 4
