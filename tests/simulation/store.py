"""A store node: memory around the production ``StoreCore``, and what the mover takes for a client.

Clients are as ``kvstore.client`` has them over a socket: reserve, fill, commit; a checksum that is
compared with every read; whatever is held ends with the process that holds it. Beside each slot
lies what is not in a real arena, for the checks: whose block it is.
"""

import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.clock import MS, US
from pdserve.errors import ChecksumMismatch, OutOfBlocks, StoreError, StoreUnavailable
from pdserve.ids import BlockKey, HostId, RequestId, SlotId, StoreId, TicketId
from pdserve.kvstore.answers import ClaimGrant, PrefixQuote, StoreChanges, StoreStat, WriteGrant
from pdserve.kvstore.arena import block_checksum
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.masters import membership
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Member
from pdserve.messages import Address
from tests.simulation.loop import SimProcess, VirtualLoop, current_process
from tests.unit.engine.fakes import BLOCK_BYTES

CHECK_EVERY = 16
"""Events of a node between two looks through all its books, which take as long as its arena is."""

HEAR_NS = 100 * MS
"""Between two tries of a kernel to tell a node beyond a partition that a connection has ended."""


class StoreNode:
    """One incarnation. ``host`` names the node; every start is another ``store_id`` and epoch."""

    def __init__(
        self,
        loop: VirtualLoop,
        process: SimProcess,
        master: membership.Membership,
        *,
        incarnation: int,
        slot_count: int,
        note: Callable[[str], None],
    ) -> None:
        host = process.host
        self.process = process
        self.store_id = StoreId(f"store-{host}")
        self.address = Address(
            HostId(host), f"/sim/{host}/store-{incarnation}", f"{host}:{9000 + incarnation}"
        )
        self.member: Member = master.join(self.store_id, self.address)
        self.core = StoreCore(slot_count, hard_pins_max=slot_count // 4)
        self.slot_count = slot_count
        self.alive = True
        self.is_full = False  # of memory: nothing more can be reserved
        self._payloads = [bytearray(BLOCK_BYTES) for _ in range(slot_count)]
        self.owners_tenant: dict[tuple[SlotId, int], str] = {}
        self._tickets = itertools.count()
        self._loop = loop
        self._note = note
        self._event_count = 0
        self.granted: set[TicketId] = set()
        process.on_death.append(self.die)

    def die(self) -> None:
        self.alive = False

    def payload(self, slot: SlotId) -> memoryview:
        return memoryview(self._payloads[slot])

    def new_ticket(self) -> TicketId:
        return TicketId(f"t-{self.store_id}-{self.member.epoch}-{next(self._tickets)}")

    def settle(self) -> None:
        """After each event; as ``StoreServer.settle``."""
        self.core.take_evicted()
        self.core.take_changed_slots()
        self.granted.update(self.core.tickets.take_granted())
        self.core.pins.expire(self._loop.now_ns)
        self._event_count += 1
        if self._event_count % CHECK_EVERY == 0:
            self.check()

    def check(self) -> None:
        """I3: what is owned, free and lent is all there is; and all of the core's own rules."""
        self.core.check()
        stat = self.core.stat()
        accounted = (
            stat.slots_free + stat.slots_reserved + stat.slots_committed + stat.slots_private
            + stat.slots_quarantined + stat.slots_draining
        )  # fmt: skip
        assert accounted == stat.slots_total, f"I3: {accounted} of {stat.slots_total} slots"

    def flip_bit(self, dice: random.Random) -> str | None:
        """One bit of a committed block, at rest."""
        found = (self.core._slots.find(key) for key in self.core._slots.keys_by_depth())
        slots = sorted(slot for slot in found if slot is not None)
        if not slots:
            return None
        slot = dice.choice(slots)
        self._payloads[slot][dice.randrange(BLOCK_BYTES)] ^= 1 << dice.randrange(8)
        return f"slot {slot}"

    def leaks(self) -> list[str]:
        stat = self.core.stat()
        held = {
            "claims": stat.claims,
            "writes": stat.writes,
            "tickets": stat.tickets,
            "pinned slots": stat.slots_pinned,
            "reserved slots": stat.slots_reserved,
            "private slots": stat.slots_private,
        }
        return [f"{count} {name} at {self.store_id}" for name, count in held.items() if count]


@dataclass
class SimClaim:
    grant: ClaimGrant
    keys: tuple[BlockKey, ...]
    tenant: str  # whose blocks they must be

    @property
    def has_tail(self) -> bool:
        return self.grant.has_tail

    @property
    def count(self) -> int:
        return len(self.grant.slots) - self.grant.has_tail


class SimStoreClient:
    """Implements ``engine.mover.Store`` and what the worker shell asks of its own client."""

    has_disk = False

    def __init__(self, node: StoreNode, owner: str, *, reach: Callable[[StoreNode], bool]) -> None:
        """``reach`` says whether the network lets this process talk to the node now."""
        process = current_process()
        assert process is not None
        self.store_id = node.store_id
        self.counters: Counter[str] = Counter()
        self._node = node
        self._reach = reach
        self._process = process
        self._preopened: dict[tuple[RequestId, int], TicketId | OutOfBlocks] = {}
        if not (node.alive and reach(node)):
            raise StoreUnavailable("the store node cannot be reached: nobody answers")
        self._owner = node.core.connect(owner)
        self._closed = False
        self._is_known = True  # to the node
        process.on_death.append(self._on_death)

    def memory(self) -> tuple[memoryview, ...]:
        return ()

    # ── coming and going ─────────────────────────────────────────────────────────────────────────

    def _on_death(self) -> None:
        """The node hears of it from its kernel."""
        loop = self._node._loop
        loop.at(loop.now_ns + 200 * US, self._disconnect, self._node.process)

    def close(self) -> None:
        self._closed = True
        self._disconnect()

    def _disconnect(self) -> None:
        """The node learns that the connection has ended, when the network lets it."""
        self._closed = True
        node = self._node
        if not self._is_known or not node.alive:
            return
        if self._reach(node):
            self._is_known = False
            node.core.disconnect(self._owner)
            node.settle()
        else:
            loop = node._loop
            loop.at(loop.now_ns + HEAR_NS, self._disconnect, node.process)

    def _core(self) -> StoreCore:
        """
        Raises:
            StoreUnavailable: nobody answers. With that the connection ends, as it does in
                production when a call has no answer in time.
        """
        if not self._closed and self._node.alive and self._reach(self._node):
            return self._node.core
        self.close()
        raise StoreUnavailable("the store node is gone")

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def quote(self, keys: Sequence[BlockKey]) -> PrefixQuote:
        present = self._core().prefix_count(keys)
        return PrefixQuote(present, present, 0.0, 0.0)

    def claim(self, keys: Sequence[BlockKey], *, fetch: bool = True, tenant: str = "") -> SimClaim:
        grant = self._core().claim(self._owner, keys)
        self._node.settle()
        return SimClaim(grant, tuple(keys[: len(grant.slots)]), tenant)

    def adopt(self, ticket: TicketId) -> SimClaim:
        tenant = self._tenant_of(ticket)
        grant = self._core().adopt(self._owner, ticket)
        self._node.settle()
        return SimClaim(grant, (), tenant)

    def read_each(
        self, claim: SimClaim, indices: Sequence[int], take: Callable[[int, memoryview], None]
    ) -> None:
        core, node = self._core(), self._node
        for position, index in enumerate(indices):
            slot, record = core.claimed(self._owner, claim.grant.claim, index)
            assert record.generation == claim.grant.generations[index], (
                f"I2: slot {slot} was claimed as generation {claim.grant.generations[index]} and "
                f"is {record.generation} while it is held"
            )
            key = claim.keys[index] if index < len(claim.keys) else record.key
            assert record.key == key, f"I2: slot {slot} has another block than was claimed"
            writer = node.owners_tenant[slot, record.generation]
            assert claim.tenant == writer, f"I2: {claim.tenant} reads a block of {writer}"
            payload = node.payload(slot)
            if block_checksum(record.key, payload) != record.checksum:
                self.counters["checksum_failures"] += 1
                core.condemn(self._owner, claim.grant.claim, index)
                node.settle()
                raise ChecksumMismatch(f"block {index} is not what was written")
            take(position, memoryview(bytes(payload)))
            self.counters["blocks_restored"] += 1

    def release(self, claim: SimClaim) -> None:
        with contextlib.suppress(StoreUnavailable):
            if claim.grant.claim:
                self._core().release(self._owner, claim.grant.claim)
                self._node.settle()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────

    def put(
        self,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
        *,
        tenant: str = "",
    ) -> int:
        if self._node.is_full:
            return 0
        grant = self._core().reserve(self._owner, keys, first, tenant=tenant)
        self.counters["blocks_put"] += len(grant.slots)
        return self._write(grant, keys, fill, tenant)

    def push(
        self,
        ticket: TicketId,
        keys: Sequence[BlockKey],
        first: int,
        fill: Callable[[int, memoryview], None],
    ) -> None:
        tenant = self._tenant_of(ticket)
        grant = self._core().reserve_push(self._owner, ticket, keys, first)
        self._write(grant, keys, fill, tenant)

    def push_tail(self, ticket: TicketId, fill: Callable[[memoryview], None]) -> None:
        tenant = self._tenant_of(ticket)
        grant = self._core().reserve_tail(self._owner, ticket)
        self._write(grant, [None], lambda _, out: fill(out), tenant)

    def _tenant_of(self, ticket: TicketId) -> str:
        found = self._core().tickets.find(ticket)
        return "" if found is None else found.tenant

    def _write(
        self,
        grant: WriteGrant,
        keys: Sequence[BlockKey | None],
        fill: Callable[[int, memoryview], None],
        tenant: str,
    ) -> int:
        if grant.write == 0:
            self._node.settle()
            return grant.stored_count
        core, node = self._core(), self._node
        for position, slot in enumerate(grant.slots):
            index = grant.first_index + position
            fill(index, node.payload(slot))
            checksum = block_checksum(keys[index], node.payload(slot))
            core.filled(self._owner, grant.write, position, checksum)
            node.owners_tenant[slot, core._slots[slot].generation] = tenant
        stored = core.commit(self._owner, grant.write)
        node.settle()
        return stored

    def begin_push(self, ticket: TicketId, keys: Sequence[BlockKey], first: int) -> None:
        """Blocks go whole, as over a socket."""

    def begin_tail(self, ticket: TicketId) -> None: ...

    def finish(self, write: object) -> None:
        raise AssertionError("there are no pieces")

    def give_up(self, write: object) -> None:
        raise AssertionError("there are no pieces")

    # ── tickets ──────────────────────────────────────────────────────────────────────────────────

    def ask_ticket(
        self,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        wait_ms: int,
        tenant: str,
    ) -> "Waiting | None":
        """Ask ahead of ``open_ticket``, which then has the answer; None: it is there."""
        node = self._node
        ticket = node.new_ticket()
        is_open = self._core().open_ticket(
            self._owner,
            ticket,
            request,
            attempt,
            reader=reader,
            block_count=block_count,
            deadline_ns=node._loop.now_ns + wait_ms * MS,
            tenant=tenant,
        )
        node.settle()
        if is_open:
            self._preopened[request, attempt] = ticket
            return None
        return Waiting(self, ticket, request, attempt, node._loop.now_ns + wait_ms * MS)

    def open_ticket(
        self,
        request: RequestId,
        attempt: int,
        *,
        reader: str,
        block_count: int,
        wait_ms: int,
        tenant: str,
    ) -> TicketId:
        self._core()
        answer = self._preopened.pop((request, attempt))
        if isinstance(answer, OutOfBlocks):
            raise answer
        return answer

    def seal(self, ticket: TicketId) -> None:
        self._core().seal(self._owner, ticket)
        self._node.settle()

    def abort(self, ticket: TicketId) -> None:
        with contextlib.suppress(StoreUnavailable):
            self._core().abort(ticket)
            self._node.settle()

    def abort_attempts(self, request: RequestId, attempt: int | None) -> None:
        with contextlib.suppress(StoreUnavailable):
            self._core().abort_attempts(self._owner, request, attempt)
            self._node.settle()

    # ── for the shell ────────────────────────────────────────────────────────────────────────────

    def changes(self, after: int) -> StoreChanges:
        return self._core().changes(after)

    def stat(self) -> StoreStat:
        return self._core().stat(self._owner)


@dataclass
class Waiting:
    """A ticket in the node's queue, and the mover that waits for it."""

    client: SimStoreClient
    ticket: TicketId
    request: RequestId
    attempt: int
    until_ns: int

    def over(self, now_ns: int) -> bool:
        """Whether the wait has ended; the client has the answer then."""
        node = self.client._node
        if not node.alive or self.client._closed:
            self.client._preopened[self.request, self.attempt] = OutOfBlocks(1, 0, retry_after_ms=1)
            return True
        if self.ticket in node.granted:
            node.granted.discard(self.ticket)
            self.client._preopened[self.request, self.attempt] = self.ticket
            return True
        if now_ns < self.until_ns:
            return False
        expired = dict(node.core.tickets.expire(now_ns))
        node.settle()
        error = expired.get(self.ticket, OutOfBlocks(1, 0, retry_after_ms=1))
        self.client._preopened[self.request, self.attempt] = error
        return True


class Membership:
    """Production ``Membership`` and ``EmbeddedMetadata`` on a file; I7 is judged here."""

    def __init__(self, path: Path) -> None:
        self.metadata = EmbeddedMetadata(path)
        self.master = membership.Membership(self.metadata)
        self._youngest: dict[StoreId, int] = {}

    def check(self) -> None:
        """I7: the entry of a node is never an older one than was seen before."""
        for member in self.metadata.members():
            before = self._youngest.get(member.store_id, 0)
            assert member.epoch >= before, (
                f"I7: {member.store_id} is entered under epoch {member.epoch} after {before}"
            )
            self._youngest[member.store_id] = member.epoch

    def check_entry(self, member: Member) -> None:
        """I7: whoever came last is entered, whatever those before it said since."""
        entries = {each.store_id: each.epoch for each in self.metadata.members()}
        youngest = self._youngest.get(member.store_id, member.epoch)
        found = entries.get(member.store_id)
        assert found == youngest, f"I7: {member.store_id} is entered as {found}, not {youngest}"

    def speaks(self, member: Member) -> bool:
        """A node says that it is there, as after a long pause; whether it is still believed."""
        try:
            self.metadata.register(member)
            self.master.check(member.store_id, member.epoch)
        except StoreError:
            return False
        youngest = self._youngest.get(member.store_id, 0)
        assert member.epoch >= youngest, (
            f"I7: {member.store_id} speaks under epoch {member.epoch}, and {youngest} is another's"
        )
        return True
