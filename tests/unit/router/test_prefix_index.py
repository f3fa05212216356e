"""Who has which prefix, beside a model that keeps a set of keys for every location."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.ids import StoreId
from pdserve.router.prefix_index import Hits, PrefixIndex
from tests.unit.router.build import keys

DOCUMENT = keys("a", 8)
STORE = StoreId("store")
OTHER = StoreId("other store")
BOTH = 0b11


def _index(*held: int) -> PrefixIndex:
    """Workers at slots 0, 1, … of one host, with so many leading blocks of the document."""
    index = PrefixIndex()
    for slot, count in enumerate(held):
        index.join(slot, STORE)
        index.update(slot, DOCUMENT[:count], ())
    return index


def test_a_prefix_ends_at_the_first_block_that_is_missing() -> None:
    index = _index(5)
    index.update(0, (), DOCUMENT[2:3])
    assert index.hits(DOCUMENT, 1) == ((2, 1),)


def test_a_pool_and_its_hosts_store_make_up_for_each_other() -> None:
    index = _index(3, 0)
    index.update(STORE, DOCUMENT[3:6], ())
    assert index.hits(DOCUMENT, BOTH) == ((0, 0b10), (6, 0b01))


def test_another_hosts_store_is_nothing_to_a_worker() -> None:
    index = _index(0)
    index.join(1, OTHER)
    index.update(OTHER, DOCUMENT, ())
    assert index.hits(DOCUMENT, BOTH) == ((0, 0b01), (8, 0b10))


def test_one_store_has_a_prefix_and_not_two_together() -> None:
    index = _index(8)
    index.join(1, OTHER)
    index.update(STORE, DOCUMENT[:3], ())
    index.update(OTHER, DOCUMENT[3:], ())
    assert index.stored_blocks(DOCUMENT) == 3  # nor does the pool count that has all
    index.update(OTHER, DOCUMENT[:3], ())
    assert index.stored_blocks(DOCUMENT) == 8
    assert index.stored_blocks(()) == 0


def test_everything_may_be_there_and_nothing() -> None:
    assert _index(8).hits(DOCUMENT, 1) == ((8, 1),)
    assert _index(8).hits((), 1) == ((0, 1),)
    assert _index(0).hits(DOCUMENT, 1) == ((0, 1),)
    assert _index(8).hits(DOCUMENT, 0) == ()


def test_only_those_asked_for_are_told() -> None:
    assert _index(8, 4, 4).hits(DOCUMENT, 0b110) == ((4, 0b110),)


def test_what_came_back_within_one_report_is_there() -> None:
    index = _index(1)
    index.update(0, DOCUMENT[:1], DOCUMENT[:1])
    assert index.hits(DOCUMENT, 1) == ((1, 1),)


def test_a_forgotten_location_has_nothing_and_may_learn_anew() -> None:
    index = _index(8, 2)
    index.forget(0)
    index.forget(0)
    assert index.hits(DOCUMENT, BOTH) == ((0, 0b01), (2, 0b10))
    index.update(0, DOCUMENT[:1], ())
    assert index.hits(DOCUMENT, BOTH) == ((1, 0b01), (2, 0b10))


def test_nothing_is_learned_of_who_is_not_there() -> None:
    index = PrefixIndex()
    index.update(0, DOCUMENT, ())
    index.update(STORE, DOCUMENT, ())
    index.forget(0)
    assert index.key_count(0) == index.key_count(STORE) == 0
    index.join(0, STORE)
    assert index.hits(DOCUMENT, 1) == ((0, 1),)


def test_a_slot_has_one_worker() -> None:
    with pytest.raises(AssertionError, match="slot 0 is taken"):
        _index(1).join(0, OTHER)


def test_a_slots_next_worker_starts_with_nothing_of_its_own() -> None:
    index = _index(8, 0)
    index.update(STORE, DOCUMENT[:2], ())
    index.leave(0, STORE)
    index.join(0, STORE)
    assert index.hits(DOCUMENT, 1) == ((2, 1),)


def test_a_stores_blocks_are_forgotten_with_its_last_worker() -> None:
    index = _index(0, 0)
    index.update(STORE, DOCUMENT, ())
    index.leave(0, STORE)
    assert index.key_count(STORE) == 8
    index.leave(1, STORE)
    index.join(0, STORE)
    assert index.hits(DOCUMENT, 1) == ((0, 1),)


def test_a_location_is_remembered_up_to_a_bound() -> None:
    index = PrefixIndex(location_keys_max=3)
    index.join(0, STORE)
    index.update(0, DOCUMENT, ())
    assert index.key_count(0) == 3
    assert index.hits(DOCUMENT[5:], 1) == ((3, 1),)
    assert index.hits(DOCUMENT, 1) == ((0, 1),)


# ── a model ──────────────────────────────────────────────────────────────────────────────────────

SLOTS = 6
KEYS_MAX = 12
POOL_OF_KEYS = (*keys("a", 8), *keys("b", 8))
SOME_KEYS = st.lists(st.sampled_from(POOL_OF_KEYS), max_size=10)
HOSTS = st.sampled_from((STORE, OTHER))


class IndexMachine(RuleBasedStateMachine):
    """Workers come and go at slots; each location's keys are a list, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(location_keys_max=KEYS_MAX)
        self.store_of: dict[int, StoreId] = {}
        self.held: dict[int | StoreId, list[bytes]] = {}

    @rule(slot=st.integers(0, SLOTS - 1), store=HOSTS)
    def join(self, slot: int, store: StoreId) -> None:
        if slot not in self.store_of:
            self.index.join(slot, store)
            self.store_of[slot] = store
            self.held[slot] = []
            self.held.setdefault(store, [])

    @precondition(lambda self: self.store_of)
    @rule(choice=st.integers(0, SLOTS - 1))
    def leave(self, choice: int) -> None:
        slot = sorted(self.store_of)[choice % len(self.store_of)]
        store = self.store_of.pop(slot)
        self.index.leave(slot, store)
        del self.held[slot]
        if store not in self.store_of.values():
            del self.held[store]

    @rule(location=st.one_of(st.integers(0, SLOTS - 1), HOSTS), added=SOME_KEYS, removed=SOME_KEYS)
    def update(self, location: int | StoreId, added: list[bytes], removed: list[bytes]) -> None:
        self.index.update(location, added, removed)
        held = self.held.get(location)
        if held is not None:
            held[:] = [key for key in held if key not in removed]
            held += [key for key in dict.fromkeys(added) if key not in held]
            del held[: max(0, len(held) - KEYS_MAX)]

    @rule(location=st.one_of(st.integers(0, SLOTS - 1), HOSTS))
    def forget(self, location: int | StoreId) -> None:
        self.index.forget(location)
        if location in self.held:
            self.held[location].clear()

    @rule(prompt=st.lists(st.sampled_from(POOL_OF_KEYS), max_size=9))
    def ask_for_any_prompt(self, prompt: list[bytes]) -> None:
        self._ask(tuple(prompt))

    @invariant()
    def documents_are_found_as_far_as_they_go(self) -> None:
        self._ask(POOL_OF_KEYS[:8])
        self._ask(POOL_OF_KEYS[8:])

    @invariant()
    def keys_are_bounded(self) -> None:
        for location, held in self.held.items():
            assert self.index.key_count(location) == len(held) <= KEYS_MAX
        all_held = {key for held in self.held.values() for key in held}
        assert len(self.index._in_pools.keys() | self.index._in_stores.keys()) == len(all_held)

    def _ask(self, prompt: tuple[bytes, ...]) -> None:
        slots = sum(1 << slot for slot in self.store_of)
        assert self.index.hits(prompt, slots) == self._expected(prompt)
        stores = [set(self.held[store]) for store in set(self.store_of.values())]
        stored = [
            next((i for i, k in enumerate(prompt) if k not in s), len(prompt)) for s in stores
        ]
        assert self.index.stored_blocks(prompt) == max(stored, default=0) or not stores

    def _expected(self, prompt: tuple[bytes, ...]) -> Hits:
        bits: dict[int, int] = {}
        for slot, store in self.store_of.items():
            usable = {*self.held[slot], *self.held[store]}
            blocks = next((i for i, key in enumerate(prompt) if key not in usable), len(prompt))
            bits[blocks] = bits.get(blocks, 0) | 1 << slot
        return tuple(sorted(bits.items()))


IndexMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestIndex = IndexMachine.TestCase


def test_as_long_as_its_version_is_the_same_so_are_its_answers() -> None:
    """Whoever remembers an answer goes by that."""
    index = PrefixIndex()
    changes: list[Callable[[], None]] = [
        lambda: index.join(0, STORE),
        lambda: index.update(0, DOCUMENT[:2], ()),
        lambda: index.update(STORE, DOCUMENT[2:4], ()),
        lambda: index.update(0, (), DOCUMENT[:1]),
        lambda: index.join(1, STORE),
        lambda: index.forget(STORE),
        lambda: index.leave(0, STORE),
    ]
    seen = [index.version]
    for change in changes:
        change()
        seen.append(index.version)
    assert len(set(seen)) == len(seen)
    index.hits(DOCUMENT, BOTH)
    assert index.version == seen[-1]
