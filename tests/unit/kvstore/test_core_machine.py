"""A machine that tries everything on a small store, with bytes in its slots.

The model is the memory: ``self.memory[slot]`` is what was last written there. Writers scribble at
any moment between their reservation and their commit, also when their ticket has been aborted by
somebody else in the meantime. Whoever holds a block must find its bytes, whatever happens around.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.errors import BlockMissing, CapacityError, FrameError, TicketGone
from pdserve.ids import BlockKey, RequestId, SlotId, TicketId
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.evicting import blocks_of_prompt, evict
from pdserve.kvstore.slot_states import SlotState
from pdserve.kvstore.tickets import ANYBODY, OwnerId, TicketState

SLOT_COUNT = 5
NAMES = ["p", "d1", "d2"]
LETTERS = "ab"

chains = st.text(LETTERS, min_size=1, max_size=5)
numbers = st.integers(0, 1000)


def keys_of(word: str) -> list[BlockKey]:
    """Of the chain whose blocks are the letters of ``word``; a key is the prefix itself."""
    return [BlockKey(word[:end].encode().ljust(16, b".")) for end in range(1, len(word) + 1)]


@dataclass
class HeldClaim:
    owner: OwnerId
    grant: ClaimGrant
    contents: list[bytes]


@dataclass
class OpenWrite:
    owner: OwnerId
    grant: WriteGrant
    contents: list[bytes]
    ticket: TicketId | None


@dataclass
class KnownTicket:
    writer: OwnerId
    reader: str
    word: str
    contents: list[bytes] = field(default_factory=list)
    has_tail: bool = False
    sealed: bool = False


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.core = StoreCore(SLOT_COUNT, changes_max=8, shares={"a": 2}, hard_pins_max=2)
        self.owners: dict[OwnerId, str] = {}
        self.memory: dict[SlotId, bytes] = {}
        self.claims: list[HeldClaim] = []
        self.writes: list[OpenWrite] = []
        self.tickets: dict[TicketId, KnownTicket] = {}
        self.now_ns = 0
        self.copy: set[BlockKey] = set()
        self.copy_sequence = 0
        self.tail_count = 0

    # ── connections ──────────────────────────────────────────────────────────────────────────

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: len(self.owners) < 5)
    def connect(self, name: str) -> None:
        self.owners[self.core.connect(name)] = name

    @rule(which=numbers)
    @precondition(lambda self: self.owners)
    def disconnect(self, which: int) -> None:
        owner = self._owner(which)
        del self.owners[owner]
        self.core.disconnect(owner)
        self.claims = [claim for claim in self.claims if claim.owner != owner]
        self.writes = [write for write in self.writes if write.owner != owner]

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    @rule(which=numbers, word=chains)
    @precondition(lambda self: self.owners)
    def claim(self, which: int, word: str) -> None:
        owner = self._owner(which)
        grant = self.core.claim(owner, keys_of(word))
        contents = [bytes(key) for key in keys_of(word)[: len(grant.slots)]]
        if grant.claim:
            self.claims.append(HeldClaim(owner, grant, contents))

    @rule(which=numbers)
    @precondition(lambda self: self.claims)
    def release(self, which: int) -> None:
        claim = self.claims.pop(which % len(self.claims))
        self.core.release(claim.owner, claim.grant.claim)
        self.core.release(claim.owner, claim.grant.claim)

    @rule(which=numbers, index=numbers)
    @precondition(lambda self: self.claims)
    def condemn(self, which: int, index: int) -> None:
        claim = self.claims[which % len(self.claims)]
        index %= len(claim.contents)
        self.core.condemn(claim.owner, claim.grant.claim, index)
        with pytest.raises(BlockMissing):
            self.core.claimed(claim.owner, claim.grant.claim, index)

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    @rule(which=numbers, word=chains, first=st.integers(0, 5))
    @precondition(lambda self: self.owners)
    def reserve(self, which: int, word: str, first: int) -> None:
        owner, keys = self._owner(which), keys_of(word)
        # By what comes first of all, as with real keys, which a tenant's name is part of.
        grant = self.core.reserve(owner, keys, min(first, len(keys)), tenant=word[0])
        self._note_write(owner, grant, keys, None)

    @rule(which=numbers)
    @precondition(lambda self: self.writes)
    def scribble(self, which: int) -> None:
        write = self.writes[which % len(self.writes)]
        for slot in write.grant.slots:
            self.memory[slot] = b"half a block"

    @rule(which=numbers)
    @precondition(lambda self: self.writes)
    def commit(self, which: int) -> None:
        write = self.writes.pop(which % len(self.writes))
        for position, slot in enumerate(write.grant.slots):
            self.memory[slot] = write.contents[position]
            self.core.filled(write.owner, write.grant.write, position, 7)
        try:
            self.core.commit(write.owner, write.grant.write)
        except TicketGone:
            assert write.ticket is not None
            assert self._state(write.ticket) is TicketState.GONE
            return
        if write.ticket is not None:
            ticket = self.tickets[write.ticket]
            ticket.contents += write.contents

    @rule(which=numbers)
    @precondition(lambda self: self.writes)
    def abandon(self, which: int) -> None:
        write = self.writes.pop(which % len(self.writes))
        self.core.abandon(write.owner, write.grant.write)
        ticket = self.tickets.get(write.ticket) if write.ticket else None
        if ticket is not None and write.contents[0].startswith(b"tail"):
            ticket.has_tail = False

    # ── tickets ──────────────────────────────────────────────────────────────────────────────

    @rule(
        which=numbers,
        word=chains,
        reader=st.sampled_from([*NAMES, ANYBODY]),
        wait_ns=st.integers(0, 20),
    )
    @precondition(lambda self: self.owners)
    def open_ticket(self, which: int, word: str, reader: str, wait_ns: int) -> None:
        owner = self._owner(which)
        ticket = TicketId(f"t-{len(self.tickets)}")
        try:
            self.core.open_ticket(
                owner,
                ticket,
                RequestId("r"),
                0,
                reader=reader,
                block_count=len(word) + 1,  # room for a tail
                deadline_ns=self.now_ns + wait_ns,
            )
        except CapacityError:
            assert len(word) + 1 > SLOT_COUNT
            return
        self.tickets[ticket] = KnownTicket(owner, reader, word)

    @rule(which=numbers, count=st.integers(1, 3))
    @precondition(lambda self: self.tickets)
    def push(self, which: int, count: int) -> None:
        name, ticket = self._ticket(which)
        first = len(ticket.contents)
        keys = keys_of(ticket.word)[: first + count]
        if ticket.writer not in self.owners or ticket.has_tail or first >= len(keys):
            return
        try:
            grant = self.core.reserve_push(ticket.writer, name, keys, first)
        except (TicketGone, FrameError):
            assert self._state(name) is not TicketState.OPEN or self._is_being_written(name)
            return
        ticket.contents += [bytes(key) for key in keys[first : grant.first_index]]
        self._note_write(ticket.writer, grant, keys, name)

    @rule(which=numbers)
    @precondition(lambda self: self.tickets)
    def push_tail(self, which: int) -> None:
        name, ticket = self._ticket(which)
        if ticket.writer not in self.owners or ticket.has_tail:
            return
        try:
            grant = self.core.reserve_tail(ticket.writer, name)
        except (TicketGone, FrameError):
            assert self._state(name) is not TicketState.OPEN or self._is_being_written(name)
            return
        ticket.has_tail = True
        self.tail_count += 1
        content = f"tail {self.tail_count}".encode()
        self.writes.append(OpenWrite(ticket.writer, grant, [content], name))

    @rule(which=numbers)
    @precondition(lambda self: self.tickets)
    def seal(self, which: int) -> None:
        name, ticket = self._ticket(which)
        if ticket.writer not in self.owners:
            return
        try:
            self.core.seal(ticket.writer, name)
        except TicketGone:
            assert self._state(name) is not TicketState.OPEN
        except FrameError:
            assert self._is_being_written(name)

    @rule(which=numbers)
    @precondition(lambda self: self.tickets)
    def abort(self, which: int) -> None:
        name, _ = self._ticket(which)
        self.core.abort(name)
        assert self._state(name) is TicketState.GONE

    @rule(which=numbers, by=numbers)
    @precondition(lambda self: self.tickets and self.owners)
    def adopt(self, which: int, by: int) -> None:
        name, ticket = self._ticket(which)
        owner = self._owner(by)
        sealed = self._state(name) is TicketState.SEALED
        try:
            grant = self.core.adopt(owner, name)
        except TicketGone:
            assert not sealed or ticket.reader not in (ANYBODY, self.owners[owner])
            return
        assert sealed
        assert len(grant.slots) == len(ticket.contents)
        if grant.claim:
            self.claims.append(HeldClaim(owner, grant, list(ticket.contents)))

    # ── pins ─────────────────────────────────────────────────────────────────────────────────

    @rule(word=chains, hard=st.booleans(), lifetime_ns=st.integers(1, 20))
    def pin(self, word: str, hard: bool, lifetime_ns: int) -> None:
        until_ns = self.now_ns + lifetime_ns
        try:
            self.core.pins.pin(keys_of(word), hard=hard, until_ns=until_ns)
        except CapacityError:
            assert hard

    @rule(word=chains)
    def unpin(self, word: str) -> None:
        self.core.pins.unpin(self.core.slots.lookup(keys_of(word)))

    @rule(word=chains, pinned=st.booleans())
    def evict(self, word: str, pinned: bool) -> None:
        chosen = blocks_of_prompt(self.core.slots, keys_of(word))
        evict(self.core.slots, self.core.pins, chosen, pinned=pinned)

    @rule(elapsed_ns=st.integers(1, 10))
    def time_passes(self, elapsed_ns: int) -> None:
        self.now_ns += elapsed_ns
        self.core.pins.expire(self.now_ns)
        for ticket, _ in self.core.tickets.expire(self.now_ns):
            assert self._state(ticket) is TicketState.GONE
        deadline_ns = self.core.tickets.next_deadline_ns()
        assert deadline_ns is None or deadline_ns > self.now_ns

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    @invariant()
    def invariants_hold(self) -> None:
        self.core.check()

    @invariant()
    def whoever_holds_a_block_finds_its_bytes(self) -> None:
        for claim in self.claims:
            for index, content in enumerate(claim.contents):
                try:
                    slot, record = self.core.claimed(claim.owner, claim.grant.claim, index)
                except BlockMissing:
                    continue
                assert slot == claim.grant.slots[index]
                assert record.generation == claim.grant.generations[index]
                assert self.memory[slot] == content

    @invariant()
    def what_can_be_found_was_written(self) -> None:
        for key in self.core.changes(-1).added:
            slot = self.core._slots.find(key)
            assert slot is not None
            assert self.memory[slot] == key

    @invariant()
    def a_copy_that_follows_the_feed_equals_the_index(self) -> None:
        changes = self.core.changes(self.copy_sequence)
        self.copy = set() if not changes.complete else self.copy
        self.copy = (self.copy - set(changes.removed)) | set(changes.added)
        self.copy_sequence = changes.sequence
        assert self.copy == set(self.core.changes(-1).added)

    def teardown(self) -> None:
        for owner in self.owners:
            self.core.disconnect(owner)
        self.core.pins.expire(self.now_ns + 20)
        self.core.check()
        stat = self.core.stat()
        assert stat.slots_free + stat.slots_committed == SLOT_COUNT
        assert (stat.slots_pinned, stat.tickets) == (0, 0)

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    def _owner(self, which: int) -> OwnerId:
        return list(self.owners)[which % len(self.owners)]

    def _ticket(self, which: int) -> tuple[TicketId, KnownTicket]:
        """One of the last few: older ones are mostly gone."""
        recent = list(self.tickets)[-3:]
        name = recent[which % len(recent)]
        return name, self.tickets[name]

    def _state(self, name: TicketId) -> TicketState:
        ticket = self.core.tickets.find(name)
        return TicketState.GONE if ticket is None else ticket.state

    def _is_being_written(self, name: TicketId) -> bool:
        return any(write.ticket == name for write in self.writes)

    def _note_write(
        self, owner: OwnerId, grant: WriteGrant, keys: list[BlockKey], ticket: TicketId | None
    ) -> None:
        if grant.write:
            for slot in grant.slots:
                assert self.core._slots[slot].state is SlotState.RESERVED
            contents = [bytes(key) for key in keys[grant.first_index :][: len(grant.slots)]]
            self.writes.append(OpenWrite(owner, grant, contents, ticket))


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestStoreMachine = StoreMachine.TestCase
