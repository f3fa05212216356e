"""The map of keys beside a dictionary, with keys that meet."""

from itertools import count, islice

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.keymap import BATCH_MIN, LANES, KeyMap

SLOTS = 12


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


class Beside(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.map = KeyMap(SLOTS)
        self.model: dict[BlockKey, SlotId] = {}
        self.free = [SlotId(slot) for slot in range(SLOTS)]

    @rule(number=st.integers(0, 40))
    def add(self, number: int) -> None:
        if self.free and key(number) not in self.model:
            slot = self.free.pop()
            self.map.set_key(slot, key(number))
            self.map.add(slot)
            self.model[key(number)] = slot

    @rule(chance=st.randoms(use_true_random=False))
    def remove(self, chance: object) -> None:
        if self.model:
            gone = chance.choice(sorted(self.model))  # type: ignore[attr-defined]
            slot = self.model.pop(gone)
            self.map.remove(slot)
            self.free.append(slot)

    @rule(numbers=st.lists(st.integers(0, 40), max_size=3 * BATCH_MIN))
    def find_each(self, numbers: list[int]) -> None:
        keys = [key(number) for number in numbers]
        found = self.map.find_each(keys)
        expected = [self.model.get(each, -1) for each in keys]
        first_missing = expected.index(-1) if -1 in expected else len(expected)
        assert found == expected[: len(found)]
        assert len(found) > first_missing or len(found) == len(expected)

    @rule(numbers=st.lists(st.integers(0, 200), max_size=3 * BATCH_MIN))
    def has_any(self, numbers: list[int]) -> None:
        keys = [key(number) for number in numbers]
        assert self.map.has_any(keys) == any(each in self.model for each in keys)

    @invariant()
    def agrees(self) -> None:
        assert self.map.count == len(self.model)
        self.map.check(list(self.model.values()))
        for number in range(41):
            assert self.map.find(key(number)) == self.model.get(key(number))


TestKeyMap = Beside.TestCase
TestKeyMap.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_what_is_no_key_is_not_found_not_even_beside_another() -> None:
    """The bytes of keys of wrong lengths must not be read as those of the keys around them."""
    keys = [key(number) for number in range(BATCH_MIN)]
    known = KeyMap(BATCH_MIN)
    for slot, each in enumerate(keys):
        known.set_key(SlotId(slot), each)
        known.add(SlotId(slot))
    cut = [BlockKey(keys[0][:7]), BlockKey(keys[0][7:] + keys[1]), *keys[2:]]
    assert b"".join(cut) == b"".join(keys)
    assert known.find_each(cut) == [-1]
    assert known.find(BlockKey(b"")) is None


def test_an_empty_place_is_no_slot_even_for_the_last_ones_key() -> None:
    known = KeyMap(SLOTS)
    known.set_key(SlotId(SLOTS - 1), key(7))  # it has the key, and cannot be found
    assert known.find_each([key(7)] * BATCH_MIN) == [-1]


@given(st.binary(min_size=16, max_size=16))
def test_a_key_is_kept_as_it_is(raw: bytes) -> None:
    known = KeyMap(2)
    known.set_key(SlotId(1), BlockKey(raw))
    assert known.key_of(SlotId(1)) == raw
    assert known.key_of(SlotId(0)) == bytes(16)


def test_keys_of_a_full_bucket_are_found_alone_and_together_until_they_are_removed() -> None:
    known = KeyMap(SLOTS)
    numbers = (number for number in count() if hash(key(number)) % known._bucket_count == 0)
    keys = [key(number) for number in islice(numbers, SLOTS)]
    for slot, each in enumerate(keys):
        known.set_key(SlotId(slot), each)
        known.add(SlotId(slot))
    assert len(known._overflow) == SLOTS - LANES
    known.check([SlotId(slot) for slot in range(SLOTS)])
    many = keys * (BATCH_MIN // SLOTS + 1)
    assert known.find_each(many) == list(range(SLOTS)) * (BATCH_MIN // SLOTS + 1)
    assert known.has_any([keys[-1]] * BATCH_MIN)
    for slot in range(SLOTS):
        known.remove(SlotId(slot))
        assert known.find_each(keys[slot:]) == [-1]
        assert not known.has_any([keys[slot]] * BATCH_MIN)
    known.check([])


def test_who_has_the_bucket_and_the_tag_of_another_is_not_taken_for_it() -> None:
    """Of 4,000 strangers some sixty have both: as many candidates as keys, and the bytes decide."""
    there = KeyMap(SLOTS)
    for slot in map(SlotId, range(SLOTS)):
        there.set_key(slot, key(slot))
        there.add(slot)
    expected = [slot % SLOTS for slot in range(BATCH_MIN)]
    known = [key(slot) for slot in expected]
    assert there.find_each(known) == expected
    for number in range(1000, 5000):
        assert there.find_each([*known, key(number)]) == [*expected, -1]
        assert there.find_each([key(number), *known]) == [-1]
