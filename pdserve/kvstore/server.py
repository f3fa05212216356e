"""The shell around ``StoreCore``: connections, arena headers, block bytes, the clock.

Everything runs in one event loop, so the core sees one event after the other. After each event the
headers of the slots that it changed are written, and only then its answer goes out: who is told of
a slot finds its header right.
"""

import asyncio
import logging
from typing import Any

from pdserve.clock import MS, Clock, S, monotonic
from pdserve.errors import ChecksumMismatch, ErrorInfo, FrameError, PdserveError
from pdserve.ids import TicketId, new_ticket_id
from pdserve.kvstore import protocol
from pdserve.kvstore.arena import Arena, block_checksum
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.tickets import OwnerId
from pdserve.wire.connection import Connection, Frame
from pdserve.wire.frame import Buffer

_log = logging.getLogger(__name__)


class StoreServer:
    """Serves one arena. ``serve`` is what a ``Listener`` awaits for each connection."""

    def __init__(
        self, core: StoreCore, arena: Arena, welcome: protocol.Welcome, clock: Clock = monotonic
    ) -> None:
        self._core = core
        self._arena = arena
        self._welcome = welcome
        self._clock = clock
        self._waiting: dict[TicketId, tuple[Connection, Frame]] = {}
        self._late_answers: set[asyncio.Task[None]] = set()
        self._alarm: asyncio.TimerHandle | None = None

    async def serve(self, connection: Connection) -> None:
        frame = await connection.receive()
        if not isinstance(frame.message, protocol.Greet):
            raise FrameError(f"{type(frame.message).__name__} before Greet")
        owner = self._core.connect(frame.message.owner)
        try:
            await connection.answer(frame, self._welcome)
            while True:
                frame = await connection.receive()
                answer, body = self._take(owner, connection, frame)
                if answer is not None:
                    await connection.answer(frame, answer, body)
        finally:
            self._core.disconnect(owner)
            for ticket, (waiting, _) in list(self._waiting.items()):
                if waiting is connection:
                    del self._waiting[ticket]
            self._settle()

    def _take(
        self, owner: OwnerId, connection: Connection, frame: Frame
    ) -> tuple[object | None, tuple[Buffer, ...]]:
        """The answer to one message, with its body; None when it comes later."""
        answer: object | None
        body: tuple[Buffer, ...] = ()
        try:
            match frame.message:
                case protocol.OpenTicket():
                    answer = self._open_ticket(owner, connection, frame)
                case protocol.ReadBlock(claim, index):
                    slot, record = self._core.claimed(owner, claim, index)
                    answer = protocol.BlockHeader(record.generation, record.checksum, record.key)
                    body = (self._arena.payload(slot),)
                case protocol.Fill():
                    answer = self._fill(owner, frame.message, frame.body)
                case message:
                    answer = self._decide(owner, message)
        except PdserveError as error:
            answer, body = ErrorInfo.of(error), ()
        self._settle()
        return answer, body

    def _decide(self, owner: OwnerId, message: Any) -> object:  # noqa: PLR0911, PLR0912
        """The answer to a message that has neither body nor delay: one case each."""
        core = self._core
        match message:
            case protocol.ClaimPrefix(keys):
                return core.claim(owner, keys)
            case protocol.Reserve(keys, first):
                return core.reserve(owner, keys, first)
            case protocol.ReservePush(ticket, keys, first):
                return core.reserve_push(owner, ticket, keys, first)
            case protocol.ReserveTail(ticket):
                return core.reserve_tail(owner, ticket)
            case protocol.Commit(write, checksums):
                for position, checksum in enumerate(checksums or ()):
                    core.filled(owner, write, position, checksum)
                return protocol.Committed(core.commit(owner, write))
            case protocol.AdoptTicket(ticket):
                return core.adopt(owner, ticket)
            case protocol.ListChanges(after):
                return core.changes(after)
            case protocol.AskStat():
                return core.stat(owner)
            case protocol.SealTicket(ticket):
                core.seal(owner, ticket)
            case protocol.AbortTicket(ticket):
                core.abort(ticket)
            case protocol.Abandon(write):
                core.abandon(owner, write)
            case protocol.ReleaseClaim(claim):
                core.release(owner, claim)
            case protocol.CondemnBlock(claim, index):
                core.condemn(owner, claim, index)
            case _:
                raise FrameError(f"{type(message).__name__} is not for a store node")
        return protocol.Done()

    def _fill(self, owner: OwnerId, message: protocol.Fill, body: memoryview) -> protocol.Done:
        block_bytes = self._arena.geometry.block_bytes
        if len(body) != len(message.checksums) * block_bytes:
            raise FrameError(
                f"{len(body)} bytes for {len(message.checksums)} blocks of {block_bytes}"
            )
        for index, checksum in enumerate(message.checksums):
            position = message.position + index
            slot, key = self._core.to_fill(owner, message.write, position)
            self._arena.write(slot, body[index * block_bytes : (index + 1) * block_bytes])
            # Over what lies in the arena now: a mistake of the copy would be found as well.
            arrived = block_checksum(key, self._arena.payload(slot))
            if message.verify and arrived != checksum:
                raise ChecksumMismatch(f"block {position} of a write changed on its way here")
            self._core.filled(owner, message.write, position, checksum)
        return protocol.Done()

    def _open_ticket(
        self, owner: OwnerId, connection: Connection, frame: Frame
    ) -> protocol.TicketOpened | None:
        message: protocol.OpenTicket = frame.message
        ticket = new_ticket_id()
        is_open = self._core.open_ticket(
            owner,
            ticket,
            message.request,
            message.attempt,
            reader=message.reader,
            block_count=message.block_count,
            deadline_ns=self._clock() + message.wait_ms * MS,
        )
        if is_open:
            return protocol.TicketOpened(ticket)
        self._waiting[ticket] = (connection, frame)
        return None

    def _settle(self) -> None:
        """Carry out what the last event brought beside its answer."""
        for slot, record in self._core.take_changed_slots().items():
            self._arena.write_header(slot, record)
        for ticket in self._core.tickets.take_granted():
            self._answer_late(ticket, protocol.TicketOpened(ticket))
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        deadline_ns = self._core.tickets.next_deadline_ns()
        if deadline_ns is not None:
            delay_s = max(0, deadline_ns - self._clock()) / S
            self._alarm = asyncio.get_running_loop().call_later(delay_s, self._on_alarm)

    def _on_alarm(self) -> None:
        for ticket, error in self._core.tickets.expire(self._clock()):
            self._answer_late(ticket, ErrorInfo.of(error))
        self._settle()

    def _answer_late(self, ticket: TicketId, answer: object) -> None:
        waiting = self._waiting.pop(ticket, None)
        if waiting is None:
            return  # whoever waited is gone, and its ticket with it
        connection, frame = waiting
        task = asyncio.get_running_loop().create_task(_send_late(connection, frame, answer))
        self._late_answers.add(task)
        task.add_done_callback(self._late_answers.discard)


async def _send_late(connection: Connection, frame: Frame, answer: object) -> None:
    try:
        await connection.answer(frame, answer)
    except PdserveError as error:
        _log.info("a ticket was granted to %s, which is gone: %s", connection.peer, error)
