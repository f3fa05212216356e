"""Soft and hard pins: what they keep, for how long, and what they may not."""

import pytest

from pdserve.errors import CapacityError
from pdserve.ids import BlockKey, RequestId, TicketId
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.evicting import blocks_of_all, blocks_of_prompt, blocks_of_tenant, evict
from pdserve.kvstore.readers import NOBODY, Readers
from pdserve.kvstore.tickets import OwnerId
from tests.unit.kvstore.test_readers import FakeReaders


def keys_of(word: str) -> list[BlockKey]:
    return [BlockKey(word[:end].encode().ljust(16, b".")) for end in range(1, len(word) + 1)]


class Rig:
    def __init__(
        self, slot_count: int = 6, hard_max: int = 3, *, readers: Readers = NOBODY
    ) -> None:
        self.core = StoreCore(slot_count, eviction="lru", hard_pins_max=hard_max, readers=readers)
        self.owner: OwnerId = self.core.connect("worker")

    def put(self, word: str, tenant: str = "") -> None:
        write = self.core.reserve(self.owner, keys_of(word), 0, tenant=tenant)
        for position in range(len(write.slots)):
            self.core.filled(self.owner, write.write, position, 7)
        if write.write:
            self.core.commit(self.owner, write.write)
        self.core.check()

    def stored(self, word: str) -> int:
        return self.core.prefix_count(keys_of(word))

    def evict(self, word: str, *, pinned: bool = False) -> int:
        slots = self.core.slots
        count = evict(slots, self.core.pins, blocks_of_prompt(slots, keys_of(word)), pinned=pinned)
        self.core.check()
        return count


def test_a_soft_pin_goes_last_and_only_when_nothing_else_is_left() -> None:
    rig = Rig(4)
    rig.put("ab")
    assert rig.core.pins.pin(keys_of("abx"), hard=False, until_ns=10) == 2
    rig.put("cd")
    rig.put("ef")  # c and d were used later, and go
    assert (rig.stored("ab"), rig.stored("cd"), rig.stored("ef")) == (2, 0, 2)
    rig.put("ghij")
    assert (rig.stored("ab"), rig.stored("ghij")) == (0, 4)
    assert rig.core.pins.soft_count == 0


def test_after_its_time_a_block_is_like_any_other() -> None:
    rig = Rig(4)
    rig.put("ab")
    rig.core.pins.pin(keys_of("ab"), hard=False, until_ns=10)
    rig.put("cd")
    rig.core.pins.expire(9)
    assert rig.core.pins.soft_count == 2
    assert rig.core.pins.next_end_ns() == 10
    rig.core.pins.expire(10)
    assert (rig.core.pins.soft_count, rig.core.pins.next_end_ns()) == (0, None)
    rig.put("e")
    assert (rig.stored("ab"), rig.stored("cd")) == (1, 2)


def test_a_hard_pin_is_never_evicted_while_it_lasts() -> None:
    rig = Rig(4)
    rig.put("ab")
    rig.core.pins.pin(keys_of("ab"), hard=True, until_ns=10)
    rig.core.check()
    rig.put("cdef")
    assert (rig.stored("ab"), rig.stored("cdef")) == (2, 2)
    assert rig.core.stat().slots_available == 2
    rig.core.pins.expire(10)
    rig.put("ghij")
    assert (rig.stored("ab"), rig.stored("ghij")) == (0, 4)


def test_hard_pins_beyond_the_quota_are_refused_whole() -> None:
    rig = Rig(6, hard_max=3)
    rig.put("abcd")
    with pytest.raises(CapacityError, match=r"4 more .* beside 0: at most 3 .* 6 .*hard_pin_ratio"):
        rig.core.pins.pin(keys_of("abcd"), hard=True)
    assert len(rig.core.pins.hard) == 0
    assert rig.core.pins.pin(keys_of("abc"), hard=True) == 3
    assert rig.core.pins.pin(keys_of("ab"), hard=True) == 2  # these have one already
    rig.core.check()


def test_the_longer_of_two_pins_counts() -> None:
    rig = Rig()
    rig.put("abc")
    rig.core.pins.pin(keys_of("abc"), hard=True, until_ns=10)
    rig.core.pins.pin(keys_of("ab"), hard=True, until_ns=20)
    rig.core.pins.pin(keys_of("a"), hard=True, until_ns=5)
    rig.core.check()
    rig.core.pins.expire(10)
    assert len(rig.core.pins.hard) == 2
    rig.core.pins.expire(20)
    assert len(rig.core.pins.hard) == 0
    rig.core.check()


def test_unpinning_leaves_what_a_longer_pinned_prefix_needs() -> None:
    rig = Rig()
    rig.put("abc")
    rig.put("abd")
    rig.core.pins.pin(keys_of("abc"), hard=True)
    slots = rig.core.slots
    assert rig.core.pins.unpin(slots.lookup(keys_of("abd"))) == 0
    assert rig.core.pins.unpin(slots.lookup(keys_of("ab"))) == 0
    assert rig.core.pins.unpin(slots.lookup(keys_of("abc"))) == 3
    rig.core.check()


def test_a_wrong_block_loses_its_hard_pin_and_its_slot_comes_back() -> None:
    rig = Rig()
    rig.put("abc")
    rig.core.pins.pin(keys_of("abc"), hard=True)
    rig.core.pins.pin(keys_of("abc"), hard=False, until_ns=10)
    claim = rig.core.claim(rig.owner, keys_of("abc"))
    rig.core.condemn(rig.owner, claim.claim, 1)
    rig.core.check()
    assert (len(rig.core.pins.hard), rig.core.pins.soft_count) == (1, 1)
    rig.core.release(rig.owner, claim.claim)
    assert rig.core.stat().slots_free == 5


def test_so_it_does_where_its_reader_had_pinned_it_by_itself() -> None:
    readers = FakeReaders()
    rig = Rig(readers=readers)
    rig.put("abc")
    rig.core.pins.pin(keys_of("abc"), hard=True)
    chain = rig.core.slots.lookup(keys_of("abc"))
    readers.held[rig.owner] = chain
    rig.core.condemn_slot(rig.owner, chain[1], rig.core.slots[chain[1]].generation)
    rig.core.check()
    assert len(rig.core.pins.hard) == 1
    readers.held[rig.owner] = []
    assert rig.core.stat().slots_free == 5


def test_a_hand_off_that_waits_gets_the_slots_of_a_hard_pin_that_ends() -> None:
    rig = Rig(4, hard_max=4)
    rig.put("ab")
    rig.core.pins.pin(keys_of("ab"), hard=True, until_ns=10)
    ticket = TicketId("t")
    opened = rig.core.open_ticket(
        rig.owner, ticket, RequestId("r"), 0, reader="*", block_count=3, deadline_ns=99
    )
    assert not opened
    rig.core.pins.expire(10)
    assert rig.core.tickets.take_granted() == [ticket]
    rig.core.check()


def test_pins_that_are_renewed_for_ever_take_no_more_memory() -> None:
    rig = Rig()
    rig.put("ab")
    for until_ns in range(1, 2000):
        rig.core.pins.pin(keys_of("ab"), hard=False, until_ns=until_ns)
    assert len(rig.core.pins._ends) <= 2 * 2 + 64 + 2
    rig.core.pins.check()


def test_evicting_a_prompt_takes_what_is_its_own_and_builds_on_it() -> None:
    rig = Rig(8)
    rig.put("abcd")
    rig.put("abxy")
    assert rig.evict("abc") == 2  # c, and d that builds on it; a and b are the other's too
    assert (rig.stored("abcd"), rig.stored("abxy")) == (2, 4)
    assert rig.evict("abzz") == 0
    assert rig.evict("abxy") == 4


def test_evicting_leaves_what_somebody_holds_and_all_before_it() -> None:
    rig = Rig(8)
    rig.put("abcd")
    claim = rig.core.claim(rig.owner, keys_of("ab"))
    assert rig.evict("abcd") == 2
    rig.core.release(rig.owner, claim.claim)
    rig.core.pins.pin(keys_of("a"), hard=True)
    assert rig.evict("ab") == 1
    assert rig.evict("a", pinned=True) == 1
    assert rig.core.stat().slots_free == 8


def test_evicting_by_tenant_takes_that_tenants_blocks() -> None:
    rig = Rig(8)
    rig.put("ab", tenant="one")
    rig.put("cd", tenant="two")
    slots, pins = rig.core.slots, rig.core.pins
    assert evict(slots, pins, blocks_of_tenant(slots, "three"), pinned=False) == 0
    assert evict(slots, pins, blocks_of_tenant(slots, "one"), pinned=False) == 2
    assert (rig.stored("ab"), rig.stored("cd")) == (0, 2)
    assert evict(slots, pins, blocks_of_all(slots), pinned=False) == 2
    rig.core.check()
