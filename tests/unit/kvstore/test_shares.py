"""Tenants' shares: who gives way, who does not, and what it comes to in the end."""

import random
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.eviction import Lru
from pdserve.kvstore.shares import ACCOUNTS_MAX, Accounts, EvictionOrder
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import OwnerId


def key(tenant: str, number: int) -> BlockKey:
    return BlockKey(f"{tenant}{number}".encode().ljust(16, b"."))


class Store:
    """A core whose evictions are watched, and a worker that writes for everybody."""

    def __init__(self, slot_count: int, weights: Mapping[str, float] | None) -> None:
        self.core = StoreCore(slot_count, shares=weights, hard_pins_max=slot_count)
        self.owner: OwnerId = self.core.connect("worker")
        self.evicted: list[str] = []
        order = self.core.slots.order
        take = order.take

        def watched(now: int, is_current: Callable[[SlotId, int, int], bool]) -> SlotId:
            above, _ = order.accounts.ranked()
            could = {number for slot, number in self._leaves() if number in above}
            slot = take(now, is_current)
            if weights and could:
                assert order.accounts.number_of(slot) in could, "one within its share gave way"
            found = self.core.slots[slot].key
            assert found is not None
            self.evicted.append(found.decode().rstrip("."))
            return slot

        order.take = watched  # type: ignore[method-assign]

    def _leaves(self) -> list[tuple[SlotId, int]]:
        slots = self.core.slots
        return [
            (slot, slots.order.accounts.number_of(slot))
            for slot in map(SlotId, range(slots.slot_count))
            if slots[slot].state is SlotState.COMMITTED
            and not slots[slot].pins
            and not slots[slot].children
        ]

    def put(self, tenant: str, *numbers: int) -> None:
        """Blocks that build on nothing, each used now."""
        for number in numbers:
            keys = [key(tenant, number)]
            claim = self.core.claim(self.owner, keys)
            self.core.release(self.owner, claim.claim)
            write = self.core.reserve(self.owner, keys, 0, tenant=tenant)
            for position in range(len(write.slots)):
                self.core.filled(self.owner, write.write, position, 7)
            if write.write:
                self.core.commit(self.owner, write.write)

    def uses(self) -> dict[str, int]:
        return {use.tenant: use.slots for use in self.core.slots.order.accounts.uses()}


def test_a_flood_takes_what_is_free_and_then_its_own() -> None:
    store = Store(8, {"a": 1, "b": 1})
    trace = []
    for tenant, numbers in [("a", range(3)), ("b", range(7)), ("a", range(3, 6)), ("c", range(9))]:
        for number in numbers:
            store.put(tenant, number)
        uses = " ".join(f"{name}={count}" for name, count in sorted(store.uses().items()))
        trace.append(f"{tenant} puts {len(numbers)}: {uses}, evicted {' '.join(store.evicted)}")
        store.evicted.clear()
    assert trace == [
        "a puts 3: a=3, evicted ",
        "b puts 7: a=3 b=5, evicted b0 b1",
        "a puts 3: a=4 b=4, evicted b2 a0 a1",
        "c puts 9: a=2 b=3 c=3, evicted a2 b3 a3 c0 c1 c2 c3 c4 c5",
    ]


def test_without_weights_all_blocks_compete_alike() -> None:
    store = Store(4, None)
    store.put("a", 0, 1)
    store.put("b", *range(6))
    assert store.uses() == {"b": 4}


def max_min(slot_count: int, tenants: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """By filling up: (weight, wanted) of each tenant."""
    given: dict[str, float] = {}
    left, open_ = float(slot_count), dict(tenants)
    while open_:
        level = left / sum(weight for weight, _ in open_.values())
        modest = [name for name, (weight, wanted) in open_.items() if wanted <= level * weight]
        for name in modest or list(open_):
            weight, wanted = open_.pop(name)
            given[name] = min(wanted, level * weight)
            left -= given[name]
    return given


@settings(max_examples=25, deadline=None)
@given(
    st.integers(8, 40),
    st.lists(
        st.tuples(st.sampled_from([0.5, 1, 2, 3]), st.integers(1, 40)), min_size=1, max_size=4
    ),
    st.randoms(use_true_random=False),
)
def test_what_results_is_the_weighted_max_min_allocation(
    slot_count: int, kinds: list[tuple[float, int]], chance: random.Random
) -> None:
    tenants = {f"t{index}-": kind for index, kind in enumerate(kinds)}
    store = Store(slot_count, {name: weight for name, (weight, _) in tenants.items()})
    wanted = [(name, number) for name, (_, count) in tenants.items() for number in range(count)]
    for _ in range(3):  # each comes back to its blocks over and over, in any order
        chance.shuffle(wanted)
        for name, number in wanted:
            store.put(name, number)
    store.core.check()
    found = store.uses()
    for name, share in max_min(slot_count, tenants).items():
        # Blocks are whole, so a tenant may miss its share by one, and who wants less than a whole
        # share has all of it.
        assert found.get(name, 0) >= share - 1, f"{name} of {tenants}: {found}"
        if tenants[name][1] <= share - 1:
            assert found[name] == tenants[name][1], f"{name} of {tenants}: {found}"


def test_a_large_write_of_one_at_its_share_evicts_its_own() -> None:
    store = Store(8, {"*": 1})
    store.put("a", *range(4))
    store.put("b", *range(4))
    write = store.core.reserve(store.owner, [key("c", 0)], 0, tenant="a")
    assert len(write.slots) == 1
    assert store.evicted == ["a0"]


def test_one_large_put_gets_no_slots_within_anothers_share() -> None:
    store = Store(8, {"*": 1})
    store.put("a", *range(3))
    chain = [key("b", number) for number in range(8)]
    write = store.core.reserve(store.owner, chain, 0, tenant="b")
    assert len(write.slots) == 5
    assert store.evicted == []


def test_soft_pins_do_not_protect_one_above_its_share_from_one_below() -> None:
    store = Store(8, {"*": 1})
    store.put("a", *range(8))
    for number in range(8):
        store.core.pins.pin([key("a", number)], hard=False, until_ns=100)
    store.put("b", *range(4))
    assert store.uses() == {"a": 4, "b": 4}


def test_who_holds_all_of_an_account_makes_the_next_one_give_way() -> None:
    store = Store(6, {"*": 1})
    store.put("a", *range(4))
    for number in range(4):
        store.core.claim(store.owner, [key("a", number)])
    store.put("b", *range(5))
    assert store.uses() == {"a": 4, "b": 2}


def test_more_tenants_than_accounts_share_one() -> None:
    accounts = Accounts(ACCOUNTS_MAX + 5, {"*": 1})
    for index in range(ACCOUNTS_MAX + 5):
        accounts.assign([SlotId(index)], accounts.charge(f"t{index}", 1))
    uses = list(accounts.uses())
    assert uses[0].tenant == "*"
    assert uses[0].slots == 5
    assert len(uses) == ACCOUNTS_MAX + 1
    accounts.freed(SlotId(0))
    accounts.assign([SlotId(0)], accounts.charge("late", 1))
    assert accounts.find("late") is not None
    accounts.check(lambda slot: False)


def test_a_tenant_that_left_has_no_weight_any_more() -> None:
    accounts = Accounts(8, {"a": 3, "b": 1})
    accounts.assign([SlotId(0)], accounts.charge("a", 1))
    accounts.assign([SlotId(1)], accounts.charge("b", 1))
    assert {use.tenant: use.share for use in accounts.uses()} == {"a": 6, "b": 2}
    accounts.freed(SlotId(0))
    assert [(use.tenant, use.share) for use in accounts.uses()] == [("b", 8)]


def test_an_empty_order_has_nothing_to_evict() -> None:
    with pytest.raises(AssertionError, match="nothing can be evicted"):
        EvictionOrder(Lru(), 4).take(0, lambda *_: True)
