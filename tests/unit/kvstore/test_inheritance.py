"""What a node makes of a dead one's arena: whatever was committed, and nothing else."""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.ids import BlockKey, SlotId, StoreId
from pdserve.kvstore import arena_users
from pdserve.kvstore.adoption import Predecessors, begin
from pdserve.kvstore.arena import Geometry, create_arena, lend_arena, map_arena, open_arena
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.headers import HEADER_BYTES, NO_PARENT, header_columns, pack_header
from pdserve.kvstore.inheritance import Inheritance, inherit
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.superblock import boot_id, read_superblock

STORE = StoreId("store-1")


def key(name: str) -> BlockKey:
    return BlockKey(name.encode().ljust(16, b"."))


def headers_of(core: StoreCore) -> bytearray:
    slots = core.slots
    every = map(SlotId, range(slots.slot_count))
    return bytearray(b"".join(pack_header(slot, slots[slot], 0) for slot in every))


def inherited(headers: bytearray) -> Inheritance:
    return inherit(header_columns(memoryview(headers), len(headers) // HEADER_BYTES))


class Held:
    """Readers that hold whatever they are told."""

    def __init__(self) -> None:
        self.slots: Collection[SlotId] = ()

    def hide(self, slots: Sequence[SlotId]) -> Collection[SlotId]:
        return set(slots) & set(self.slots)

    def changed(self) -> tuple[()]:
        return ()


def put(core: StoreCore, *names: str) -> None:
    owner = core.connect("w")
    write = core.reserve(owner, [key(name) for name in names], 0)
    for position in range(len(write.slots)):
        core.filled(owner, write.write, position, len(names) + position)
    if write.write:
        core.commit(owner, write.write)
    core.disconnect(owner)


def a_past(chance: random.Random, slot_count: int) -> StoreCore:
    """A core in the middle of its work."""
    core = StoreCore(slot_count)
    for _ in range(chance.randrange(12)):
        root = chance.choice("abc")
        put(core, *(root + "x" * depth for depth in range(chance.randrange(1, 5))))
    owner = core.connect("w")
    core.reserve(owner, [key("open"), key("open2")], 0)
    if core.slots.available_count:
        core.claim(owner, [key("a"), key("ax")])
    return core


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 16), st.booleans(), st.randoms(use_true_random=False))
def test_all_that_was_committed_is_there_and_free_slots_are_free(
    slot_count: int, held: bool, chance: random.Random
) -> None:
    core = a_past(chance, slot_count)
    heir = StoreCore(slot_count, inheritance=replace(inherited(headers_of(core)), held=held))
    before, after = core.slots, heir.slots
    assert sorted(after.keys_by_depth()) == sorted(before.keys_by_depth())
    for name in "abc":
        chain = [key(name + "x" * depth) for depth in range(5)]
        assert after.lookup(chain) == before.lookup(chain)
    for slot in map(SlotId, range(slot_count)):
        was, now = before[slot], after[slot]
        assert now.generation == was.generation
        if was.state is SlotState.COMMITTED:
            assert (now.state, now.key, now.checksum) == (was.state, was.key, was.checksum)
            assert (now.parent, now.depth, now.children) == (was.parent, was.depth, was.children)
            assert now.pins == held
        elif was.state is not SlotState.FREE:
            assert now.state is SlotState.DRAINING
    heir.check()
    if held:
        assert after.available_count == after.free_count
    heir.predecessors_gone()
    heir.check()
    assert after.available_count == slot_count
    put(heir, *(f"new {depth}" for depth in range(slot_count)))  # all of it can be evicted
    assert len(after.keys_by_depth()) == slot_count
    heir.check()


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 16), st.randoms(use_true_random=False))
def test_damaged_headers_cost_what_they_named_and_what_built_on_it(
    slot_count: int, chance: random.Random
) -> None:
    core = a_past(chance, slot_count)
    headers = headers_of(core)
    damaged = {SlotId(chance.randrange(slot_count)) for _ in range(chance.randrange(1, 4))}
    for slot in damaged:
        headers[slot * HEADER_BYTES + chance.randrange(HEADER_BYTES - 4)] ^= 1 << chance.randrange(
            8
        )
    heir = StoreCore(slot_count, inheritance=inherited(headers))
    heir.slots.check()
    lost = {
        slot
        for slot in map(SlotId, range(slot_count))
        if core.slots[slot].state is SlotState.COMMITTED
        and damaged & {slot, *_ancestors(core, slot)}
    }
    for slot in map(SlotId, range(slot_count)):
        was = core.slots[slot]
        is_there = was.key is not None and heir.slots.find(was.key) == slot
        assert is_there == (was.state is SlotState.COMMITTED and slot not in lost)
        if slot in damaged:  # it names no bytes that anybody has seen
            assert heir.slots[slot].generation > was.generation


def _ancestors(core: StoreCore, slot: SlotId) -> list[SlotId]:
    above = core.slots.parent(slot)
    return [] if above is None else [above, *_ancestors(core, above)]


def test_a_key_in_two_slots_and_a_ring_of_parents_do_no_harm() -> None:
    core = StoreCore(6)
    put(core, "a", "ax")
    put(core, "b")
    a, ax, b = (core.slots.find(key(name)) for name in ("a", "ax", "b"))
    assert a is not None
    assert ax is not None
    assert b is not None
    headers = headers_of(core)
    twice = core.slots[b]._replace(key=key("a"))
    headers[b * HEADER_BYTES : (b + 1) * HEADER_BYTES] = pack_header(b, twice, 0)
    heir = StoreCore(6, inheritance=inherited(headers))
    heir.slots.check()
    assert heir.slots.find(key("a")) == min(a, b)
    ring = core.slots[a]._replace(parent=ax)
    headers[a * HEADER_BYTES : (a + 1) * HEADER_BYTES] = pack_header(a, ring, 0)
    far = core.slots[b]._replace(parent=SlotId(NO_PARENT - 1))
    headers[b * HEADER_BYTES : (b + 1) * HEADER_BYTES] = pack_header(b, far, 0)
    assert inherited(headers).adopted_count == 0


def test_a_header_of_another_slot_is_wrong() -> None:
    core = StoreCore(2)
    put(core, "a")
    headers = headers_of(core)
    swapped = headers[HEADER_BYTES:] + headers[:HEADER_BYTES]
    assert inherited(headers).adopted_count == 1
    assert inherited(swapped).adopted_count == 0


def test_headers_that_nobody_wrote_are_of_free_slots() -> None:
    assert (inherited(bytearray(5 * HEADER_BYTES)).states == 0).all()


def test_what_is_in_predecessors_hands_is_freed_when_they_are_gone() -> None:
    core = StoreCore(4)
    put(core, "a")
    core.reserve(core.connect("w"), [key("b")], 0)
    readers = Held()
    left = replace(inherited(headers_of(core)), held=True)
    readers.slots = left.draining_slots
    heir = StoreCore(4, readers=readers, inheritance=left)
    assert (heir.slots.free_count, heir.stat().slots_draining) == (2, 1)
    owner = heir.connect("w")
    assert len(heir.reserve(owner, [key("c" + "x" * n) for n in range(4)], 0).slots) == 2
    assert heir.slots.find(key("a")) is not None
    readers.slots = ()
    heir.predecessors_gone()
    heir.predecessors_gone()
    heir.check()
    assert (heir.slots.free_count, heir.slots.available_count) == (1, 2)


# ── the file ─────────────────────────────────────────────────────────────────────────────────────


def began(path: Path, geometry: Geometry = Geometry(4, 100)) -> bool:  # noqa: B008  (frozen)
    """Whether the arena was taken over."""
    return begin(path, geometry, STORE, codec=PayloadCodec.UNSTATED).inheritance is not None


def test_an_arena_is_taken_over_if_all_of_it_fits(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    assert not began(path)
    assert began(path)
    assert not began(path, Geometry(5, 100))
    assert not began(path, Geometry(5, 101))
    assert began(path, Geometry(5, 101))
    path.write_bytes(path.read_bytes()[:5000])
    assert not began(path, Geometry(5, 101))


def test_an_arena_of_before_the_machine_started_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(boot_id()) == 16
    assert not began(tmp_path / "arena")
    monkeypatch.setattr("pdserve.kvstore.arena.boot_id", lambda: b"another time    ")
    assert not began(tmp_path / "arena")
    assert began(tmp_path / "arena")


def test_an_arena_whose_users_nobody_can_name_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "arena"
    with monkeypatch.context() as patched:
        patched.setattr(arena_users, "mark_use", lambda *_: False)
        create_arena(path, Geometry(4, 100), STORE)
        with open(lend_arena(path, 1), "rb") as lent:
            assert read_superblock(lent.fileno(), STORE).epoch == 0
    assert not began(path)


def test_users_of_earlier_epochs_are_seen_until_their_last_mapping_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "arena"
    create_arena(path, Geometry(4, 100), STORE)
    with open(lend_arena(path, 1), "rb") as lent:
        reader = map_arena(lent.fileno(), STORE, writable=False)
    predecessors = Predecessors(path, 2, [SlotId(1), SlotId(2)])
    assert predecessors.held_of([SlotId(2), SlotId(3)]) == {2}
    assert not arena_users.is_used_before(path, 1)
    writer = open_arena(path, STORE, writable=True, epoch=1)
    view = reader.view(SlotId(0))
    del reader
    assert predecessors.are_there()
    del view
    assert predecessors.are_there()
    writer.payload(SlotId(0))[:] = b"x" * 100
    del writer
    assert predecessors.held_of([SlotId(2)]) == ()
    again = open_arena(path, STORE, writable=True, epoch=1)
    assert not predecessors.are_there(), "whoever is gone does not come back"
    assert again.epoch == 1


def test_all_states_survive_the_way_through_a_header() -> None:
    columns = header_columns(memoryview(headers_of(a_past(random.Random(3), 8))), 8)
    assert columns.is_sound.all()
    assert np.array_equal(columns.keys.any(axis=1), columns.states >= 2)
