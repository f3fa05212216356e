"""A machine of readers who pin by themselves, among writers, other readers and tickets.

They use index and boards as they are, in files. The model is the memory: ``self.memory[slot]`` is
what was last written there, by whoever has it reserved. What a reader holds must stay as it was,
whatever the others do, and the books must be right as soon as the node has looked.
"""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.errors import CapacityError
from pdserve.ids import BlockKey, RequestId, SlotId, TicketId
from pdserve.kvstore import hazards, protocol
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.hazards import ReaderBoard, Run
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.lending import INDEX, PINS, Lending
from pdserve.kvstore.local_reads import LocalReads
from pdserve.kvstore.shared_index import map_index
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import OwnerId

SLOT_COUNT = 3

words = st.sampled_from(["a", "ab", "abc", "x", "xy", "xyz", "xq"])
numbers = st.integers(0, 1000)


def keys_of(word: str) -> list[BlockKey]:
    return [BlockKey(word[:end].encode().ljust(16, b".")) for end in range(1, len(word) + 1)]


@dataclass
class Held:
    """A claim, of the reader's own pins or the node's."""

    owner: OwnerId
    grant: ClaimGrant
    run: Run | None
    contents: list[bytes]


class SlowLook(Lending):
    """Sees the boards only while it ``looks``: else all that is on them has come there since."""

    looks = False

    def changed(self) -> Iterable[tuple[int, Sequence[SlotId]]]:
        return super().changed() if self.looks else ()


class LocalMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(hazards, "ARENA_SHARE", 1.0)
        self.directory = Path(tempfile.mkdtemp())
        arena = self.directory / "arena"
        arena.write_bytes(b"")
        self.lending = SlowLook(arena, SLOT_COUNT, can_fence=lambda: True, fence=lambda: True)
        self.core = StoreCore(SLOT_COUNT, readers=self.lending)
        self.memory: dict[SlotId, bytes] = {}
        self.readers: dict[OwnerId, LocalReads] = {}
        self.held: list[Held] = []
        self.ticket_count = 0
        self.connect()
        self.put(0, "ab")
        self.headers_are_written()

    @rule()
    @precondition(lambda self: len(self.readers) < 3)
    def connect(self) -> None:
        owner = self.core.connect("d")
        with self.lending.lend(owner, pins=True) as lent:
            index, board = map_index(lent[INDEX]), ReaderBoard(lent[PINS])
        self.readers[owner] = LocalReads(index, board, self.take, has_lower_tier=False)

    @rule(which=numbers)
    @precondition(lambda self: len(self.readers) > 1)
    def disconnect(self, which: int) -> None:
        owner = self._reader(which)
        del self.readers[owner]
        self.held = [held for held in self.held if held.owner != owner]
        self.lending.end(owner)
        self.core.disconnect(owner)

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    @rule(which=numbers, word=words)
    def claim_here(self, which: int, word: str) -> None:
        owner, keys = self._reader(which), keys_of(word)
        found = self.readers[owner].claim(keys)
        if found is None:
            return  # its board is full
        grant, run = found
        assert list(grant.slots) == self.core._slots.lookup(keys), "the index is up to date"
        self._hold(owner, grant, run, keys)

    @rule(which=numbers, word=words)
    def claim_by_asking(self, which: int, word: str) -> None:
        owner, keys = self._reader(which), keys_of(word)
        self._hold(owner, self.core.claim(owner, keys), None, keys)

    @rule(which=numbers)
    @precondition(lambda self: self.held)
    def release(self, which: int) -> None:
        held = self.held.pop(which % len(self.held))
        for _ in range(2):
            if held.run is None:
                self.core.release(held.owner, held.grant.claim)
            else:
                self.readers[held.owner].release(held.run)

    @rule(which=numbers, index=numbers)
    @precondition(lambda self: any(held.run is not None for held in self.held))
    def condemn(self, which: int, index: int) -> None:
        here = [held for held in self.held if held.run is not None]
        held = here[which % len(here)]
        index %= len(held.contents)
        slot, generation = held.grant.slots[index], held.grant.generations[index]
        was = self.core._slots[slot].state
        self.lending.looks = True
        self.core.condemn_slot(held.owner, slot, generation)
        self.lending.looks = False
        self.core.tickets.grant()
        if was is SlotState.COMMITTED:
            assert self.core._slots[slot].state is SlotState.QUARANTINED

    @rule(looks=st.booleans())
    def the_node_looks_or_not(self, looks: bool) -> None:
        self.lending.looks = looks

    @rule()
    def look(self) -> None:
        self.lending.looks = True
        self.core.room.look()
        self.lending.looks = False
        self.core.tickets.grant()
        for held in self.held:
            for slot in held.grant.slots:
                record = self.core._slots[slot]
                assert record.pins or record.state is SlotState.DRAINING

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    @rule(which=numbers, word=words)
    def put(self, which: int, word: str) -> None:
        owner, keys = self._reader(which), keys_of(word)
        grant = self.core.reserve(owner, keys, 0)
        for position, slot in enumerate(grant.slots):
            self.memory[slot] = bytes(keys[grant.first_index + position])
            self.core.filled(owner, grant.write, position, 7)
        if grant.write:
            self.core.commit(owner, grant.write)

    @rule(which=numbers, block_count=st.integers(1, SLOT_COUNT))
    def a_ticket_comes_and_goes(self, which: int, block_count: int) -> None:
        """Its writer scribbles over what it got."""
        owner = self._reader(which)
        self.ticket_count += 1
        ticket_id = TicketId(str(self.ticket_count))
        request = RequestId("r")
        try:
            is_open = self.core.open_ticket(
                owner, ticket_id, request, 0, reader="*", block_count=block_count, deadline_ns=0
            )
        except CapacityError:
            return
        ticket = self.core.tickets.find(ticket_id)
        assert ticket is not None
        if is_open:
            for slot in ticket.reserved:
                self.memory[slot] = b"scribble"
        self.core.check()
        self.core.abort(ticket_id)

    def take(self, message: object) -> bool:
        """As the node does."""
        assert isinstance(message, protocol.Released)
        for joined in message.asked:
            self.core.room.asked(split_keys(joined))
        self.core.room.let_go()
        self.core.tickets.grant()
        return True

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    @invariant()
    def headers_are_written(self) -> None:
        for slot, record in self.core.take_changed_slots().items():
            self.lending.note(slot, record)

    @invariant()
    def books_are_right(self) -> None:
        self.core.check()

    @invariant()
    def who_holds_a_block_finds_its_bytes(self) -> None:
        for held in self.held:
            for slot, content in zip(held.grant.slots, held.contents, strict=True):
                assert self.memory[slot] == content

    def teardown(self) -> None:
        self.held.clear()
        self.lending.looks = True
        for owner in self.readers:
            self.lending.end(owner)
            self.core.disconnect(owner)
        stat = self.core.stat()
        assert stat.slots_free + stat.slots_committed == SLOT_COUNT
        assert stat.slots_pinned == 0
        self.lending.close()
        shutil.rmtree(self.directory)
        self.patch.undo()

    def _reader(self, which: int) -> OwnerId:
        return list(self.readers)[which % len(self.readers)]

    def _hold(
        self, owner: OwnerId, grant: ClaimGrant, run: Run | None, keys: list[BlockKey]
    ) -> None:
        if grant.slots:
            contents = [bytes(key) for key in keys[: len(grant.slots)]]
            self.held.append(Held(owner, grant, run, contents))


LocalMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLocalMachine = LocalMachine.TestCase
