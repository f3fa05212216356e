"""Readers who pin by themselves, as the books see them."""

from collections.abc import Collection, Iterable, Sequence

import pytest

from pdserve.errors import FrameError
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.eviction import Lru
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.readers import Room
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.slots import SlotTable


def key(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(16, b"."))


class FakeReaders:
    """``held``: what is on their boards; ``late``: what comes there while the node hides slots."""

    def __init__(self) -> None:
        self.held: dict[int, list[SlotId]] = {}
        self.late: dict[int, list[SlotId]] = {}

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        self.held.update(self.late)
        return {slot for slot in slots if any(slot in held for held in self.held.values())}

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return list(self.held.items())


class Store:
    def __init__(self, slot_count: int) -> None:
        self.readers = FakeReaders()
        self.slots = SlotTable(slot_count, ChangeFeed(), Lru(), self.readers.hide)
        self.room = Room(self.slots, self.readers)

    def publish(self, *names: str) -> list[SlotId]:
        """A new chain, not pinned."""
        chain: list[SlotId] = []
        for name, slot in zip(names, self.slots.reserve(len(names)), strict=True):
            self.slots.publish(slot, key(name), chain[-1] if chain else None, checksum=7)
            chain.append(slot)
        self.slots.unpin(chain)
        return chain

    def states(self, slots: Sequence[SlotId]) -> list[SlotState]:
        return [self.slots[slot].state for slot in slots]


def test_what_a_reader_holds_is_not_evicted_nor_counted_as_available() -> None:
    store = Store(4)
    old, new = store.publish("a", "ab"), store.publish("x", "xy")
    store.readers.held[1] = old
    assert not store.room.has(3)
    assert store.states(new) == [SlotState.COMMITTED] * 2, "nothing was evicted in vain"
    assert store.room.has(2)
    assert store.states(old) == [SlotState.COMMITTED] * 2
    store.slots.check()
    store.readers.held[1] = []
    assert store.room.make(4) == 4
    store.slots.check()


def test_the_first_half_of_a_chain_is_held_with_its_second() -> None:
    """A board is read while its client writes on it, or takes something off."""
    store = Store(4)
    chain = store.publish("a", "ab", "abc")
    store.readers.held[1] = [chain[1]]
    store.room.look()
    assert [store.slots[slot].pins for slot in chain] == [1, 1, 0]
    assert sorted(store.room.counted()) == sorted(chain[:2])
    store.slots.check()


@pytest.mark.parametrize("how", ["lets go", "ends"])
def test_a_block_that_is_pinned_while_it_is_evicted_drains(how: str) -> None:
    store = Store(2)
    (held,), (other,) = store.publish("a"), store.publish("x")
    store.readers.late[1] = [held]
    assert store.room.make(2) == 1, "the other one was free at once"
    assert store.states([held, other]) == [SlotState.DRAINING, SlotState.FREE]
    assert store.slots.lookup([key("a")]) == []
    store.slots.check()
    store.room.look()
    assert store.states([held]) == [SlotState.DRAINING]
    store.readers.late.clear()
    if how == "lets go":
        store.readers.held[1] = []
        store.room.let_go()
    else:
        del store.readers.held[1]
        store.room.forget(1)
    assert store.states([held]) == [SlotState.FREE]
    assert store.slots.free_count == 2
    store.slots.check()


def test_what_may_not_be_pinned_is_passed_over() -> None:
    """An entry may be stale, or of a slot that its reader is about to find another's."""
    store = Store(3)
    (reserved,) = store.slots.reserve(1)
    store.slots.keep(private := store.slots.reserve(1)[0], None, 7)
    free = SlotId(({0, 1, 2} - {reserved, private}).pop())
    store.readers.held[1] = [reserved, private, free]
    store.room.look()
    assert list(store.room.counted()) == []
    store.slots.check()


def test_a_prompt_that_read_by_itself_is_a_use() -> None:
    store = Store(2)
    store.publish("a")
    store.publish("x")
    assert store.room.asked([key("a"), key("ab")]) == 1
    assert store.room.make(1) == 1
    assert store.slots.find(key("a")) is not None, "x was used longer ago"


def test_who_holds_a_block_may_say_that_it_is_wrong() -> None:
    store = Store(3)
    chain = store.publish("a", "ab")
    generation = store.slots[chain[0]].generation
    store.room.condemn(1, chain[0], generation)
    assert store.slots.condemned_count == 0, "it does not hold it"
    store.readers.held[1] = store.readers.held[2] = chain
    store.room.condemn(1, chain[0], generation + 1)
    assert store.slots.condemned_count == 0, "that is another block"
    store.room.condemn(1, chain[0], generation)
    assert store.states(chain) == [SlotState.QUARANTINED, SlotState.PRIVATE]
    store.room.look()
    store.slots.check()
    store.readers.held.clear()
    store.room.forget(1)
    assert store.states(chain) == [SlotState.QUARANTINED, SlotState.PRIVATE], "held by 2"
    store.room.forget(2)
    assert store.states(chain) == [SlotState.FREE] * 2
    with pytest.raises(FrameError, match="slot 3 of 3"):
        store.room.condemn(1, SlotId(3), 1)
