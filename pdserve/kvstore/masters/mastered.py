"""A store node's part in having a master: it says what it has, and copies what it is told to.

Two epochs decide whether a master is heard: its own, which must not be lower than any that this
node was spoken to under, and the node's, which must be the one it is a member under now. A node
that has joined anew answers nothing that was meant for what it was before.

A copy evicts nothing, unless it is of a node that is emptied: then it says how old its blocks are,
and may have the slots of what is worth less (``entering``). It is fetched piece by piece by a
thread, over a socket, and goes into slots that can be had when the piece is there; when there are
none left the copy ends, and what it has brought so far is a prefix like any other.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.clock import MS, S
from pdserve.errors import (
    CapacityError,
    ErrorInfo,
    FrameError,
    PdserveError,
    StoreError,
    StoreUnavailable,
)
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.attending import Body
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.entering import may_enter
from pdserve.kvstore.eviction import TURNS
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.masters.election import Fence
from pdserve.kvstore.masters.mastering import (
    AskDeltas,
    AskParents,
    Child,
    Copied,
    CopyChain,
    Deltas,
    Parents,
    Refused,
    Remembered,
    ages_in,
    pack_child,
)
from pdserve.kvstore.operations import Operations
from pdserve.kvstore.slot_states import Past, SlotState
from pdserve.kvstore.tickets import RETRY_AFTER_MS, OwnerId, TicketState
from pdserve.kvstore.use_times import UseTimes
from pdserve.messages import Address

PIECE_BYTES = 4 << 20
"""Of a copy under way: what it keeps in memory; the event loop is kept for a millisecond."""

COPY_MS_MAX = 600_000
PARENTS_AT_ONCE = 4096
"""Slots looked at between two looks at the sockets."""

NO_PARENT = BlockKey(bytes(16))

Connect = Callable[[Address, float], StoreClient]
"""``connect(address, timeout_s)``; raises StoreUnavailable."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What a copy is of."""

    keys: Sequence[BlockKey]
    pasts: Sequence[Past]  # of each block; none where nothing is evicted
    tenant: str


class Mastered:
    def __init__(
        self,
        core: StoreCore,
        arena: Arena,
        operations: Operations,
        commit: Callable[[OwnerId, int, Sequence[int]], object],
        settle: Callable[[], object],
        connect: Connect | None,
    ) -> None:
        self.epoch = 0
        """Of this node; 0: it is no member, and obeys nobody."""

        self._core = core
        self._arena = arena
        self._operations = operations
        self._commit = commit
        self._settle = settle
        self._connect = connect
        self._fence = Fence()
        self._is_copying = False
        self._use_times = UseTimes(core.slots.uses, operations.clock())

    def deltas(self, message: AskDeltas) -> tuple[Deltas | Refused, Body]:
        refused = self._refused(message)
        if refused is not None:
            return refused, ()
        self._look()
        sequence, changes = self._core.contents.since(message.after)
        geometry = self._arena.geometry
        if changes is None:
            body = self._core.contents.inventory()
            added_count, removed_count = len(body) // len(NO_PARENT), 0
        else:
            added, removed = changes
            body = b"".join((*added, *removed))
            added_count, removed_count = len(added), len(removed)
        deltas = Deltas(
            epoch=self.epoch,
            after=message.after,
            sequence=sequence,
            is_whole=changes is None,
            added=added_count,
            removed=removed_count,
            slots_free=self._core.slots.free_count,
            block_bytes=geometry.block_bytes,
            codec=self._arena.codec,
            is_draining=self._operations.draining,
            under_way=self._under_way() if self._operations.draining else 0,
        )
        return deltas, (body,) if body else ()

    async def obey(self, message: AskParents | CopyChain) -> tuple[object, Body]:
        """What takes its time; an error is an answer too."""
        try:
            if isinstance(message, CopyChain):
                return await self.copy(message), ()
            return await self.parents(message)
        except PdserveError as error:
            return ErrorInfo.of(error), ()

    async def parents(self, message: AskParents) -> tuple[Parents | Refused, Body]:
        """Linear in the arena, and in pieces: what comes or goes meanwhile may be missing."""
        refused = self._refused(message)
        if refused is not None:
            return refused, ()
        self._look()
        slots, now_ns = self._core.slots, self._operations.clock()
        accounts = slots.order.accounts
        children: list[bytes] = []
        for first in range(0, slots.slot_count, PARENTS_AT_ONCE):
            for slot in range(first, min(first + PARENTS_AT_ONCE, slots.slot_count)):
                record = slots[SlotId(slot)]
                if record.state is not SlotState.COMMITTED or record.key is None:
                    continue
                parent = None if record.parent is None else slots[record.parent].key
                remembered = Remembered(
                    self._use_times.age_ns(record.last_use, now_ns) // MS,
                    record.turn,
                    slots.worth_of(slots.past(SlotId(slot)))[0],
                    accounts.number_of(SlotId(slot)),
                )
                children.append(pack_child(Child(record.key, parent or NO_PARENT, remembered)))
            await asyncio.sleep(0)
        body = (b"".join(children),) if children else ()
        return Parents(len(children), accounts.tenants()), body

    async def copy(self, message: CopyChain) -> Copied | Refused:
        """One at a time. What could not be had in time, or has no room, is left out.

        Raises:
            CapacityError: one is under way.
            StoreError: nothing was copied, because of the other node.
        """
        refused = self._refused(message)
        if refused is not None:
            return refused
        keys = split_keys(message.keys)
        if not keys or not 0 < message.deadline_ms <= COPY_MS_MAX:
            raise FrameError(f"a copy of {len(keys)} blocks within {message.deadline_ms} ms")
        ages = ages_in(message.ages, len(keys))
        self._operations.refuse_if_draining()
        if self._is_copying or self._connect is None:
            raise CapacityError("a copy is under way already", retry_after_ms=RETRY_AFTER_MS)
        self._is_copying = True
        try:
            return await self._copy(Chain(keys, self._pasts(ages), message.tenant), message)
        finally:
            self._is_copying = False

    async def _copy(self, chain: Chain, message: CopyChain) -> Copied:
        assert self._connect is not None
        deadline_s = message.deadline_ms * MS / S
        until_s = time.monotonic() + deadline_s
        if not self._copyable(chain):
            return self._copied(0, chain)
        client = await asyncio.to_thread(self._connect, message.source, deadline_s)
        owner = self._core.connect("copy")
        copied = 0
        try:
            while (count := self._copyable(chain)) and (left_s := until_s - time.monotonic()) > 0:
                first = self._core.prefix_count(chain.keys)
                wanted = chain.keys[: first + count]
                try:
                    blocks = await asyncio.to_thread(_fetch, client, wanted, first, left_s)
                except StoreError:
                    if copied == 0:
                        raise
                    break
                stored = self._store(owner, chain, first, blocks)
                copied += stored
                if stored < count:
                    break
        finally:
            self._core.disconnect(owner)
            self._settle()
            client.close()
        return self._copied(copied, chain)

    def _copied(self, copied: int, chain: Chain) -> Copied:
        core, present = self._core, self._core.prefix_count(chain.keys)
        wants_more = bool(chain.pasts) and present < len(chain.keys)
        is_short = wants_more and not core.tickets.queued_count and not self._copyable(chain)
        return Copied(copied, present, is_short)

    def _copyable(self, chain: Chain) -> int:
        """How many blocks the next piece has."""
        core = self._core
        piece = max(1, PIECE_BYTES // self._arena.geometry.block_bytes)
        present = core.prefix_count(chain.keys)
        piece = min(piece, len(chain.keys) - present)
        if not chain.pasts or not piece:
            return min(piece, core.slots.free_count)
        return piece * may_enter(core.room, core.slots, chain.pasts[present:], chain.tenant)

    def _store(self, owner: OwnerId, chain: Chain, first: int, blocks: Sequence[memoryview]) -> int:
        """How many blocks, the first of them the chain's at ``first``, are there now that were
        not before."""
        core, keys = self._core, chain.keys[: first + len(blocks)]
        if not chain.pasts and len(keys) - core.prefix_count(keys) > core.slots.free_count:
            return 0  # somebody took the slots meanwhile
        grant = core.reserve(
            owner,
            keys,
            first,
            tenant=chain.tenant,
            between_tiers=True,
            pasts=chain.pasts[: len(keys)],
        )
        if grant.write == 0:
            return 0
        checksums = []
        for position, slot in enumerate(grant.slots):
            index = grant.first_index + position
            self._arena.write(slot, blocks[index - first])
            checksums.append(block_checksum(keys[index], self._arena.payload(slot)))
        self._commit(owner, grant.write, checksums)
        self._settle()
        return len(grant.slots)

    def _pasts(self, ages: Sequence[tuple[int, int]]) -> list[Past]:
        """As this node would know them, had the blocks been used here."""
        self._look()
        now_ns = self._operations.clock()
        return [
            Past(self._use_times.uses_at(now_ns - age_ms * MS), min(turn, TURNS - 1))
            for age_ms, turn in ages
        ]

    def _look(self) -> None:
        self._use_times.look(self._core.slots.uses, self._operations.clock())

    def _under_way(self) -> int:
        """What may bring blocks still, of which nobody knows yet."""
        writes = sum(len(owner.writes) for owner in self._core.owners.values())
        sealed = TicketState.SEALED
        pushes = sum(ticket.state is not sealed for ticket in self._core.tickets)
        return writes + pushes + self._is_copying

    def _refused(self, message: AskDeltas | AskParents | CopyChain) -> Refused | None:
        if not self.epoch or message.epoch != self.epoch:
            return Refused(self._fence.epoch, self.epoch)
        if message.master_epoch < self._fence.epoch:
            return Refused(self._fence.epoch, self.epoch)
        self._fence.admit(message.master_epoch)
        return None


def _fetch(
    client: StoreClient, keys: Sequence[BlockKey], first: int, deadline_s: float
) -> list[memoryview]:
    outs = [memoryview(bytearray(client.block_bytes)) for _ in keys[first:]]
    if not outs:
        raise StoreUnavailable("nothing is asked for")
    return outs[: client.fetch(keys, outs, first=first, deadline_s=deadline_s)]
