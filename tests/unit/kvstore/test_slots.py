"""The slot table: its transitions, the order of eviction, and condemned blocks."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.eviction import Lru
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.slot_states import EVENTS, PINNABLE, STATES, TRANSITIONS, SlotEvent, SlotState
from pdserve.kvstore.slots import STALE_RATIO, SlotTable


def key(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(16, b"."))


def table(slot_count: int) -> SlotTable:
    return SlotTable(slot_count, ChangeFeed(), Lru())


def publish(slots: SlotTable, *names: str) -> list[SlotId]:
    """A chain, or its continuation: first what is there, then new blocks; nothing stays pinned."""
    keys = [key(name) for name in names]
    chain = slots.lookup(keys)
    slots.pin(chain)
    for each in keys[len(chain) :]:
        (slot,) = slots.reserve(1)
        slots.publish(slot, each, chain[-1] if chain else None, checksum=7)
        chain.append(slot)
    slots.unpin(chain)
    slots.check()
    return chain


@pytest.mark.parametrize(("state", "event"), list(itertools.product(SlotState, SlotEvent)))
def test_every_pair_either_moves_or_is_refused(state: SlotState, event: SlotEvent) -> None:
    slots = table(1)
    slots._states[0] = STATES.index(state)
    if event in TRANSITIONS[state]:
        slots._move(SlotId(0), EVENTS.index(event))
        assert slots[SlotId(0)].state is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalTransition, match=f"{event} while slot 0 is {state}"):
            slots._move(SlotId(0), EVENTS.index(event))


def test_every_state_can_become_free_again() -> None:
    assert TRANSITIONS[SlotState.RESERVED][SlotEvent.FREE] is SlotState.FREE
    assert TRANSITIONS[SlotState.DRAINING] == {SlotEvent.FREE: SlotState.FREE}
    for state in PINNABLE:  # what can be read is not freed before the readers have been asked
        assert TRANSITIONS[state][SlotEvent.DRAIN] is SlotState.DRAINING
        assert SlotEvent.FREE not in TRANSITIONS[state]


@given(st.integers(0, 3), st.integers(1, 40))
def test_a_chain_at_once_is_its_blocks_one_after_the_other(above: int, count: int) -> None:
    names = [f"{index}" for index in range(above + count)]
    keys = [key(name) for name in names[above:]]
    checksums = list(range(count))
    both = []
    for at_once in (True, False):
        slots = table(above + count)
        chain = publish(slots, *names[:above])
        slots.pin(chain)
        taken = slots.reserve(count)
        parent = chain[-1] if chain else None
        assert slots.are_new(keys, parent)
        if at_once:
            slots.publish_chain(taken, keys, parent, checksums)
        else:
            for slot, each, checksum in zip(taken, keys, checksums, strict=True):
                slots.publish(slot, each, parent, checksum)
                parent = slot
        assert not slots.are_new(keys, parent)
        slots.unpin(chain + taken)
        slots.check()
        both.append(([slots[SlotId(slot)] for slot in range(above + count)], slots.take_changed()))
    assert both[0] == both[1]


def test_a_chain_is_not_new_if_a_block_of_it_is_there_or_comes_twice_or_lacks_its_parent() -> None:
    slots = table(4)
    (a,) = publish(slots, "a")
    assert slots.are_new([key("b"), key("c")], a)
    assert not slots.are_new([key("b"), key("a")], None)
    assert not slots.are_new([key("b"), key("b")], a)
    slots.pin([a])
    slots.condemn(a)
    assert not slots.are_new([key("b")], a)
    assert slots.are_new([key("a")], None), "what was condemned may be stored again"


def test_a_lookup_ends_at_the_first_block_that_is_missing() -> None:
    slots = table(4)
    chain = publish(slots, "a", "ab", "abc")
    assert slots.lookup([key("a"), key("ab"), key("x"), key("abc")]) == chain[:2]
    assert slots.lookup([key("x")]) == []


def test_a_lookup_follows_parents_and_not_only_keys() -> None:
    slots = table(4)
    publish(slots, "a", "ab", "abc")
    assert slots.lookup([key("a"), key("abc")]) == slots.lookup([key("a")])


def test_children_leave_before_their_parents() -> None:
    slots = table(3)
    publish(slots, "a", "ab", "abc")
    for gone in ("abc", "ab", "a"):
        assert slots.find(key(gone)) is not None
        slots.reserve(1)
        slots.check()
        assert slots.find(key(gone)) is None
    assert slots.evicted_count == 3


def test_what_was_used_longest_ago_leaves_first() -> None:
    slots = table(4)
    publish(slots, "a", "ab")
    publish(slots, "b", "ba")
    publish(slots, "a", "ab")  # a use
    slots.reserve(2)
    assert slots.lookup([key("b")]) == []
    assert len(slots.lookup([key("a"), key("ab")])) == 2


def test_a_pinned_block_is_never_evicted() -> None:
    slots = table(2)
    publish(slots, "a")
    publish(slots, "b")
    slots.pin(slots.lookup([key("a")]))  # the one used longest ago
    assert slots.available_count == 1
    slots.reserve(1)
    assert slots.find(key("a")) is not None
    assert slots.find(key("b")) is None
    with pytest.raises(AssertionError, match="1 of 0 slots"):
        slots.reserve(1)


def test_a_slot_gets_a_new_generation_with_each_reservation() -> None:
    slots = table(1)
    (slot,) = publish(slots, "a")
    generation = slots[slot].generation
    assert publish(slots, "b") == [slot]
    assert slots[slot].generation == generation + 1


def test_a_condemned_block_takes_its_descendants_out_of_the_index() -> None:
    slots = table(5)
    chain = publish(slots, "a", "ab", "abc", "abcd")
    publish(slots, "a", "ax")
    held = chain[:3]  # a, ab, abc; abcd is idle
    slots.pin(held)
    slots.condemn(chain[1])
    slots.check()
    assert slots.lookup([key("a"), key("ab"), key("abc")]) == chain[:1]
    assert slots.find(key("ax")) is not None, "a sibling is none of its descendants"
    assert [slots[slot].state for slot in chain] == [
        SlotState.COMMITTED,
        SlotState.QUARANTINED,
        SlotState.PRIVATE,
        SlotState.FREE,
    ]
    slots.condemn(chain[1])  # twice is once
    assert slots.condemned_count == 1
    slots.unpin(held)
    slots.check()
    assert [slots[slot].state for slot in chain[1:]] == [SlotState.FREE] * 3


def test_the_bytes_of_a_condemned_key_can_be_stored_again() -> None:
    slots = table(3)
    (slot,) = publish(slots, "a")
    slots.pin([slot])
    slots.condemn(slot)
    assert publish(slots, "a") != [slot]
    assert slots.find(key("a")) not in (None, slot)


def test_unpinning_more_often_than_pinning_is_a_bug() -> None:
    slots = table(1)
    chain = publish(slots, "a")
    with pytest.raises(AssertionError, match="more often than pinned"):
        slots.unpin(chain)


def test_the_order_stays_bounded_however_often_a_block_is_used() -> None:
    slots = table(2)
    chain = publish(slots, "a")
    for _ in range(1000):
        slots.pin(chain)
        slots.unpin(chain)
    assert len(slots.order) <= (1 + 2 * STALE_RATIO) * 2 + 2 * 64 + 1
    slots.check()


def test_changed_slots_are_told_once() -> None:
    slots = table(2)
    chain = publish(slots, "a")
    assert slots.take_changed() == set(chain)
    assert slots.take_changed() == set()


class _KeepsAsked(Lru):
    """Of prompts that begin with ``a``, turn 1; these are worth more."""

    def asked(self, keys: Sequence[BlockKey], now: int) -> int:
        return int(keys[0] == key("a"))

    def wrote(self, keys: Sequence[BlockKey], now: int) -> int:
        return self.asked(keys, now)

    def worth(self, turn: int, age: int) -> float:
        return float(turn)


@pytest.mark.parametrize("told_by", ["asked", "wrote"])
def test_blocks_are_worth_what_their_conversation_is(told_by: str) -> None:
    slots = SlotTable(5, ChangeFeed(), _KeepsAsked())
    kept, other = publish(slots, "a", "ab"), publish(slots, "x", "xy", "xyz")
    slots.pin(kept)
    getattr(slots, told_by)([key("a"), key("ab")], kept)
    slots.unpin(kept)
    slots.pin(other)
    slots.unpin(other)
    slots.check()
    slots.reserve(2)
    assert slots.lookup([key("a"), key("ab")]) == kept
    assert slots.lookup([key("x"), key("xy")]) == other[:1]
