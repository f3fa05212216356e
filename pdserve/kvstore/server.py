"""The shell around ``StoreCore``: connections, arena headers, block bytes, the clock.

Everything runs in one event loop, so the core sees one event after the other. After each event the
headers of the slots that it changed are written, and only then its answer goes out: who is told of
a slot finds its header right.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pdserve.clock import MS, Clock, S, monotonic
from pdserve.errors import (
    AccessDenied,
    BlockMissing,
    ChecksumMismatch,
    ErrorInfo,
    FrameError,
    PdserveError,
)
from pdserve.ids import BlockKey, SlotId, TicketId, new_ticket_id
from pdserve.kvstore import admin, protocol
from pdserve.kvstore.answers import ClaimGrant, PrefixQuote
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.arena_memory import ArenaMemory
from pdserve.kvstore.attending import (
    Body,
    NodeAttendant,
    Sent,
    fetch_blocks,
    lent,
    note_asked,
    read_blocks,
    send_late,
)
from pdserve.kvstore.capability import Capability, Gate, is_audited
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.lending import Lending
from pdserve.kvstore.masters import mastering
from pdserve.kvstore.masters.mastered import Connect, Mastered
from pdserve.kvstore.one_sided import OneSidedNode
from pdserve.kvstore.operations import Operations
from pdserve.kvstore.ssd.tier import SsdTier
from pdserve.kvstore.tickets import OwnerId
from pdserve.wire.connection import Connection, Frame
from pdserve.wire.endpoint import is_local
from pdserve.wire.frame import BODY_BYTES_MAX

_log = logging.getLogger(__name__)
audit = logging.getLogger("pdserve.kvstore.audit")
"""A line for each operation that is neither reading nor writing one's own blocks."""

EMPTY = ClaimGrant(0, (), (), has_tail=False)


class StoreServer:
    """Serves one arena. ``serve`` is what a ``Listener`` awaits for each connection."""

    def __init__(
        self,
        core: StoreCore,
        arena: Arena,
        welcome: protocol.Welcome,
        lending: Lending,
        *,
        memory: ArenaMemory | None = None,
        ssd: SsdTier | None = None,
        clock: Clock = monotonic,
        cluster_key: bytes | None = None,
        one_sided: OneSidedNode | None = None,
        connect: Connect | None = None,
    ) -> None:
        """``memory``: of the arena; None: all of it is there. ``cluster_key``: peers over TCP must
        show a token that it signed. ``connect``: to other nodes, for what a master wants copied."""
        self._one_sided = one_sided
        self._gate = Gate(cluster_key, clock)
        self._core = core
        self._ssd = ssd
        self._arena = arena
        self._lent = partial(lent, memory, core)
        self._welcome = welcome
        self._lending = lending
        self._clock = clock
        self._operations = Operations(core, arena, ssd, clock=clock, settle=self.settle)
        self._mastered = Mastered(core, arena, self._operations, self._commit, self.settle, connect)
        self._waiting: dict[TicketId, tuple[Connection, Frame, int]] = {}  # and since when
        self._late_answers: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        if ssd is not None:
            ssd.settle = self.settle
        self._alarm_ns: int | None = None  # when it rings

    def joined(self, epoch: int) -> None:
        """This node is a member under ``epoch`` from now on."""
        self._welcome = replace(self._welcome, epoch=epoch)
        self._mastered.epoch = self._operations.epoch = epoch

    def follow(self, masters: Sequence[str]) -> None:
        self._operations.masters = tuple(masters)

    async def serve(self, connection: Connection) -> None:
        connection.limit_bodies(0)  # whoever it is, a greeting needs none
        frame = await connection.receive()
        if not isinstance(frame.message, protocol.Greet):
            raise FrameError(f"{type(frame.message).__name__} before Greet")
        _refuse_unanswerable(frame)
        try:
            capability = self._gate.open(connection.peer, frame.message)
        except AccessDenied as error:
            _log.warning("%s refused: %s", connection.peer, error)
            await connection.answer(frame, ErrorInfo.of(error))
            return
        owner = self._core.connect(frame.message.owner)
        try:
            connection.limit_bodies(BODY_BYTES_MAX)
            await self._answer_greeting(owner, connection, capability, frame)
            take = partial(self._take, owner, connection, capability)
            connection.attend(NodeAttendant(connection, owner, self._core, self._arena, take))
            while True:
                frame = await connection.receive()  # what the attendant was too busy for
                if isinstance(frame.message, protocol.Released):
                    self._note_released(connection, frame.message)
                    await asyncio.sleep(0)  # many may have come at once; it is others' turn
                    continue
                _refuse_unanswerable(frame)
                if isinstance(frame.message, protocol.PullBlocks):
                    await connection.answer(frame, await self._pull(owner, capability, frame))
                    continue
                answer, body, sent = take(frame)
                if answer is not None:
                    await connection.answer(frame, answer, body)
                if sent is not None:
                    sent()
        finally:
            connection.dismiss()
            self._lending.end(owner)
            self._core.disconnect(owner)
            waiting = self._waiting.items()
            self._waiting = {ticket: late for ticket, late in waiting if late[0] is not connection}
            self.settle()

    async def _answer_greeting(
        self, owner: OwnerId, connection: Connection, capability: Capability, frame: Frame
    ) -> None:
        greeting: protocol.Greet = frame.message
        welcome = replace(self._welcome, key_prefix=capability.key_prefix)
        if not greeting.shares_memory:
            await connection.answer(frame, welcome)
            return
        if not is_local(connection.peer):
            raise FrameError(f"{connection.peer} is on another host and wants to share memory")
        with self._lending.lend(owner, pins=greeting.pins) as lent:
            welcome = replace(welcome, files=tuple(lent))
            await connection.answer_with_files(frame, welcome, tuple(lent.values()))

    def _note_released(self, connection: Connection, message: protocol.Released) -> None:
        """What a client that pins by itself has done since it last said so."""
        if not is_local(connection.peer):  # whose keys are its own, and were not looked at
            raise FrameError(f"{connection.peer} is on another host and has no pins to release")
        for joined in message.asked:
            keys = split_keys(joined)
            found_count = self._core.room.asked(keys)
            self._operations.count_claim(asked=len(keys), found=found_count)
            if self._ssd is not None:
                self._ssd.found(keys[:found_count])
        self._core.room.let_go()
        self._core.tickets.grant()
        self.settle()

    def _take(  # noqa: PLR0912
        self, owner: OwnerId, connection: Connection, capability: Capability, frame: Frame
    ) -> tuple[object | None, Body, Sent | None]:
        """The answer to one message, with its body, and what to call when that is sent; None when
        it comes later."""
        answer: object | None
        body: Body = ()
        sent: Sent | None = None
        try:
            frame = capability.admit(frame, self._clock())
            if is_audited(frame.message):
                name = type(frame.message).__name__
                audit.info("%s by %s at %s", name, capability.holder, connection.peer)
            match frame.message:
                case protocol.OpenTicket():
                    answer = self._open_ticket(owner, connection, frame)
                case protocol.ClaimPrefix(keys):
                    answer = grant = self._claim(owner, connection, frame)
                    if grant is not None and not self._operations.draining:
                        sent = partial(note_asked, self._core, owner, keys, grant)
                case admin.Prefetch(keys, tenant):
                    self._start(self._prefetch(keys, tenant))
                    answer = protocol.Done()
                case admin.AskAudit(blocks_max):
                    self._start(self._audit(blocks_max, connection, frame))
                    answer = None
                case protocol.ReadBlocks(claim, indices):
                    answer, body = read_blocks(self._core, self._arena, owner, claim, indices)
                case protocol.DescribeBlocks(claim, indices):
                    answer, _ = read_blocks(self._core, self._arena, owner, claim, indices)
                case protocol.FetchBlocks(keys):
                    if self._ssd is not None and self._ssd.has_more(keys):
                        self._start(self._fetch_from_below(self._ssd, owner, connection, frame))
                        return None, (), None
                    answer, body, sent = fetch_blocks(self._core, self._arena, owner, frame.message)
                    sent = partial(self._released, sent)
                    if self._ssd is not None:
                        self._ssd.found(keys[: frame.message.first + len(answer.headers)])
                case protocol.Fill():
                    answer = self._fill(owner, frame)
                case mastering.AskDeltas():
                    answer, body = self._mastered.deltas(frame.message)
                case mastering.AskParents() | mastering.CopyChain():
                    self._start(self._obey(connection, frame))
                    answer = None
                case message:
                    answer = self._decide(owner, message)
        except PdserveError as error:
            answer, body, sent = ErrorInfo.of(error), (), None
        self.settle()
        return answer, body, sent

    async def _pull(self, owner: OwnerId, capability: Capability, frame: Frame) -> object:
        try:
            frame = capability.admit(frame, self._clock())
            if self._one_sided is None:
                raise FrameError("this node reads no memory of its clients: it has no --mooncake")
            return await self._one_sided.pull(self._core, owner, frame.message)
        except PdserveError as error:
            return ErrorInfo.of(error)
        finally:
            self.settle()

    def _released(self, release: Sent) -> None:
        release()
        self.settle()

    async def _fetch_from_below(
        self, ssd: SsdTier, owner: OwnerId, connection: Connection, frame: Frame
    ) -> None:
        """As ``_take`` does for what is in the arena, once more of it is there."""
        message: protocol.FetchBlocks = frame.message
        await self._fetch(ssd, message.keys, tenant="")
        if not self._core.knows(owner):
            return  # its connection has ended meanwhile
        answer: object
        body: Body = ()
        release: Sent | None = None
        try:
            headers, body, release = fetch_blocks(self._core, self._arena, owner, message)
            ssd.found(message.keys[: message.first + len(headers.headers)])
            answer = headers
        except PdserveError as error:
            answer = ErrorInfo.of(error)
        self.settle()
        await send_late(connection, frame, answer, body)
        if release is not None:
            self._released(release)

    def _decide(self, owner: OwnerId, message: Any) -> object:  # noqa: PLR0911, PLR0912
        """The answer to a message that has neither body nor delay: one case each."""
        core = self._core
        match message:
            case protocol.Reserve(keys, first, tenant):
                self._operations.refuse_if_draining()
                return self._lent(owner, core.reserve(owner, keys, first, tenant=tenant))
            case protocol.ReservePush(ticket, keys, first):
                return self._lent(owner, core.reserve_push(owner, ticket, keys, first))
            case protocol.ReserveTail(ticket):
                return self._lent(owner, core.reserve_tail(owner, ticket))
            case protocol.Commit(write, checksums):
                return self._commit(owner, write, checksums or ())
            case protocol.QuotePrefix(keys):
                return self._quote(keys)
            case protocol.AdoptTicket(ticket):
                return core.adopt(owner, ticket)
            case protocol.ListChanges(after):
                return core.changes(after)
            case protocol.AskStat():
                return self._operations.stat(core.stat(owner))
            case protocol.SealTicket(ticket):
                core.seal(owner, ticket)
            case protocol.AbortTicket(ticket):
                core.abort(ticket)
            case protocol.AbortAttempts(request, attempt):
                core.abort_attempts(owner, request, attempt)
            case protocol.Abandon(write):
                core.abandon(owner, write)
            case protocol.ReleaseClaim(claim):
                core.release(owner, claim)
            case protocol.CondemnBlock(claim, index):
                if not self._is_as_written(owner, claim, index):
                    core.condemn(owner, claim, index)
            case protocol.CondemnSlot(slot, generation):
                if not self._is_slot_as_written(slot):
                    core.condemn_slot(owner, slot, generation)
            case _:
                return self._operations.decide(message) or protocol.Done()
        return protocol.Done()

    def _commit(self, owner: OwnerId, write: int, checksums: Sequence[int]) -> protocol.Committed:
        for position, checksum in enumerate(checksums):
            self._core.filled(owner, write, position, checksum)
        keys = self._core.keys_of(owner, write)
        committed = protocol.Committed(self._core.commit(owner, write))
        if self._ssd is not None and keys:
            self._ssd.stored(keys)
        return committed

    def _quote(self, keys: Sequence[BlockKey]) -> PrefixQuote:
        if self._ssd is not None:
            return self._ssd.quote(keys)
        present = self._core.prefix_count(keys)
        return PrefixQuote(present, present, 0.0, 0.0)

    def _claim(self, owner: OwnerId, connection: Connection, frame: Frame) -> ClaimGrant | None:
        message: protocol.ClaimPrefix = frame.message
        if self._operations.draining:
            return EMPTY
        if message.fetch and self._ssd is not None and self._ssd.has_more(message.keys):
            self._start(self._claim_fetched(self._ssd, owner, message, connection, frame))
            return None
        return self._claim_present(owner, message.keys)

    def _claim_present(
        self, owner: OwnerId, keys: Sequence[BlockKey], *, fetched: int = 0
    ) -> ClaimGrant:
        """``fetched``: blocks that came up for it. The caller notes that they were asked for."""
        began_ns = time.perf_counter_ns()
        grant = self._core.hold(owner, keys)
        if self._ssd is not None:
            self._ssd.found(keys[: len(grant.slots)])
        self._operations.note_claim(
            asked=len(keys),
            found=len(grant.slots),
            fetched=fetched,
            elapsed_ns=time.perf_counter_ns() - began_ns,
        )
        return grant

    async def _claim_fetched(
        self,
        ssd: SsdTier,
        owner: OwnerId,
        message: protocol.ClaimPrefix,
        connection: Connection,
        frame: Frame,
    ) -> None:
        fetched = await self._fetch(ssd, message.keys, message.tenant)
        if not self._core.knows(owner):
            return  # its connection has ended meanwhile
        answer: object
        try:
            answer = grant = self._claim_present(owner, message.keys, fetched=fetched)
            note_asked(self._core, owner, message.keys, grant)
        except PdserveError as error:
            answer = ErrorInfo.of(error)
        self.settle()
        await send_late(connection, frame, answer)

    async def _prefetch(self, keys: Sequence[BlockKey], tenant: str) -> None:
        if self._ssd is None or self._operations.draining:
            return
        if self._ssd.has_more(keys, ahead=True):
            fetched = await self._fetch(self._ssd, keys, tenant)
            self._operations.counters["blocks_prefetched"] += fetched

    async def _fetch(self, ssd: SsdTier, keys: Sequence[BlockKey], tenant: str) -> int:
        """How many blocks came up."""
        began_ns, before = self._clock(), self._core.prefix_count(keys)
        await ssd.fetch(keys, tenant)
        self._operations.phases.note(("disk", "disk"), self._clock() - began_ns)
        return max(0, self._core.prefix_count(keys) - before)

    async def _audit(self, blocks_max: int | None, connection: Connection, frame: Frame) -> None:
        answer: object
        try:
            answer = await self._operations.audit(blocks_max)
        except PdserveError as error:
            answer = ErrorInfo.of(error)
        await send_late(connection, frame, answer)

    async def _obey(self, connection: Connection, frame: Frame) -> None:
        answer, body = await self._mastered.obey(frame.message)
        await send_late(connection, frame, answer, body)

    def _fill(self, owner: OwnerId, frame: Frame) -> protocol.Done:
        message: protocol.Fill = frame.message
        block_bytes = self._arena.geometry.block_bytes
        if not frame.placed and len(frame.body) != len(message.checksums) * block_bytes:
            raise FrameError(
                f"{len(frame.body)} bytes for {len(message.checksums)} blocks of {block_bytes}"
            )
        for index, checksum in enumerate(message.checksums):
            position = message.position + index
            slot, key = self._core.to_fill(owner, message.write, position)
            if not frame.placed:
                data = frame.body[index * block_bytes : (index + 1) * block_bytes]
                self._arena.write(slot, data)
            # Over what lies in the arena now: a mistake of the copy would be found as well.
            arrived = block_checksum(key, self._arena.payload(slot))
            if message.verify and arrived != checksum:
                raise ChecksumMismatch(f"block {position} of a write changed on its way here")
            self._core.filled(owner, message.write, position, checksum)
        return protocol.Done()

    def _is_as_written(self, owner: OwnerId, claim: int, index: int) -> bool:
        """Whether a reader that found a block wrong has only its way or its memory to blame: nobody
        can make the store forget a block that is right."""
        try:
            slot, record = self._core.claimed(owner, claim, index)
        except BlockMissing:
            return False
        return block_checksum(record.key, self._arena.payload(slot)) == record.checksum

    def _is_slot_as_written(self, slot: SlotId) -> bool:
        if not 0 <= slot < self._arena.geometry.slot_count:
            return False  # the core says what is wrong with it
        header = self._arena.header(slot)  # from which the client has it
        return block_checksum(header.key, self._arena.payload(slot)) == header.checksum

    def _open_ticket(
        self, owner: OwnerId, connection: Connection, frame: Frame
    ) -> protocol.TicketOpened | None:
        message: protocol.OpenTicket = frame.message
        self._operations.refuse_if_draining()
        ticket = new_ticket_id()
        is_open = self._core.open_ticket(
            owner,
            ticket,
            message.request,
            message.attempt,
            reader=message.reader,
            block_count=message.block_count,
            deadline_ns=self._clock() + message.wait_ms * MS,
            tenant=message.tenant,
        )
        if is_open:
            self._operations.phases.note(("queue", "memory"), 0)
            return protocol.TicketOpened(ticket)
        self._waiting[ticket] = (connection, frame, self._clock())
        return None

    def predecessors_gone(self) -> None:
        """Nobody has anything from an earlier node of this arena any more."""
        self._core.predecessors_gone()
        self.settle()

    def settle(self) -> None:
        """Carry out what the last event brought beside its answer."""
        if self._ssd is not None:
            self._ssd.evicted(self._core.take_evicted())
        for slot, record in self._core.take_changed_slots().items():
            self._arena.write_header(slot, record)
            self._lending.note(slot, record)
        for ticket in self._core.tickets.take_granted():
            self._answer_late(ticket, protocol.TicketOpened(ticket))
        self._set_alarm()

    def _set_alarm(self) -> None:
        deadlines = self._core.tickets.next_deadline_ns(), self._core.pins.next_end_ns()
        deadline_ns = min((each for each in deadlines if each is not None), default=None)
        if deadline_ns == self._alarm_ns:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm, self._alarm_ns = None, deadline_ns
        if deadline_ns is not None:
            delay_s = max(0, deadline_ns - self._clock()) / S
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._on_alarm)

    def _on_alarm(self) -> None:
        self._alarm = self._alarm_ns = None
        for ticket, error in self._core.tickets.expire(self._clock()):
            self._answer_late(ticket, ErrorInfo.of(error))
        self._core.pins.expire(self._clock())
        self.settle()

    def _answer_late(self, ticket: TicketId, answer: object) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return  # whoever waited is gone, and its ticket with it
        connection, frame, since_ns = waiting
        self._operations.phases.note(("queue", "memory"), self._clock() - since_ns)
        self._start(send_late(connection, frame, answer))

    def _start(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(answering)
        self._late_answers.add(task)
        task.add_done_callback(self._late_answers.discard)


def _refuse_unanswerable(frame: Frame) -> None:
    """Of a question; what is only told has no number."""
    if frame.call == 0:
        raise FrameError(f"{type(frame.message).__name__} without a number to answer it under")
