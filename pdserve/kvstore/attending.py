"""One connection of a store node, served in the turn of the event loop in which its frames arrive.

Block bytes that come are received in the slots that were reserved for them: nothing copies them.
That is safe because the connection that brings them is the only one that can give the slots up: no
later frame of it is looked at before the body is complete, and when it ends ``dismiss`` comes
before its slots are released.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pdserve.errors import FrameError, PdserveError, StoreUnavailable
from pdserve.ids import BlockKey
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant, WriteGrant
from pdserve.kvstore.arena import Arena
from pdserve.kvstore.arena_memory import ArenaMemory
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.tickets import OwnerId
from pdserve.wire.connection import Connection
from pdserve.wire.frame import BODY_BYTES_MAX, Buffer, Frame

_log = logging.getLogger(__name__)

Body = tuple[Buffer, ...]
Sent = Callable[[], None]


class Take(Protocol):
    """``StoreServer._take`` for one connection; no answer means that it comes later."""

    def __call__(self, frame: Frame) -> tuple[object | None, Body, Sent | None]: ...


class NodeAttendant:
    def __init__(
        self, connection: Connection, owner: OwnerId, core: StoreCore, arena: Arena, take: Take
    ) -> None:
        self._connection = connection
        self._owner = owner
        self._core = core
        self._arena = arena
        self._take = take

    def place(self, message: Any, body_bytes: int) -> Sequence[memoryview] | None:
        """Into the slots of a write; None for what ``take`` will refuse."""
        if not isinstance(message, protocol.Fill):
            return None
        count = len(message.checksums)
        if body_bytes != count * self._arena.geometry.block_bytes:
            return None
        try:
            return [
                self._arena.payload(self._core.to_fill(self._owner, message.write, position)[0])
                for position in range(message.position, message.position + count)
            ]
        except PdserveError:
            return None

    def take(self, frame: Frame) -> bool:
        if not frame.call or isinstance(frame.message, protocol.PullBlocks):
            return False  # no call; or it takes its time, and nothing else may happen meanwhile
        answer, body, sent = self._take(frame)
        if answer is not None:
            self._connection.answer_now(frame, answer, body, sent)
        return True


def lent(
    memory: ArenaMemory | None, core: StoreCore, owner: OwnerId, grant: WriteGrant
) -> WriteGrant:
    """``grant``, when its slots may be written; otherwise there is no such write.

    Raises:
        StoreUnavailable: there is no memory behind them, and who writes them would end.
    """
    if memory is not None:
        try:
            memory.secure(grant.slots)
        except StoreUnavailable:
            core.abandon(owner, grant.write)
            raise
    return grant


def read_blocks(
    core: StoreCore, arena: Arena, owner: OwnerId, claim: int, indices: Sequence[int]
) -> tuple[protocol.BlockHeaders, Body]:
    """Those before the first that cannot be read.

    Raises:
        BlockMissing: that is the first one.
    """
    _refuse_if_large(len(indices), arena)
    headers: list[protocol.BlockHeader] = []
    body: list[memoryview] = []
    for index in indices:
        try:
            slot, record = core.claimed(owner, claim, index)
        except PdserveError:
            if not headers:
                raise
            break
        headers.append(
            protocol.BlockHeader(record.generation, record.checksum, record.key, arena.codec)
        )
        body.append(arena.payload(slot))
    return protocol.BlockHeaders(tuple(headers)), tuple(body)


def fetch_blocks(
    core: StoreCore, arena: Arena, owner: OwnerId, message: protocol.FetchBlocks
) -> tuple[protocol.BlockHeaders, Body, Sent]:
    """With what notes the prompt, and releases the blocks, once their bytes are with the kernel."""
    if not 0 <= message.first <= len(message.keys) or message.count < 0:
        raise FrameError(
            f"{message.count} blocks from {message.first} on, of {len(message.keys)} keys"
        )
    grant = core.hold(owner, message.keys)
    count = min(message.count, max(0, len(grant.slots) - message.first))
    indices = range(message.first, message.first + count)

    def release() -> None:
        note_asked(core, owner, message.keys, grant)
        if grant.claim and core.knows(owner):
            core.release(owner, grant.claim)

    try:
        headers, body = read_blocks(core, arena, owner, grant.claim, indices)
    except PdserveError:
        release()
        raise
    return headers, body, release


def note_asked(core: StoreCore, owner: OwnerId, keys: Sequence[BlockKey], held: ClaimGrant) -> None:
    """A prompt asked for ``keys`` and got ``held``, which its connection holds as long as it lives:
    a claim's second half, which changes the order of eviction, and which no answer waits for."""
    if core.knows(owner):
        core.slots.asked(keys, held.slots)


async def send_late(connection: Connection, frame: Frame, answer: object, body: Body = ()) -> None:
    """Of a call that was not answered in its turn; the peer may be gone by now."""
    try:
        await connection.answer(frame, answer, body)
    except PdserveError as error:
        _log.info("%s was gone when its answer was there: %s", connection.peer, error)


def _refuse_if_large(count: int, arena: Arena) -> None:
    size = count * arena.geometry.block_bytes
    if size > BODY_BYTES_MAX:
        raise FrameError(
            f"{count} blocks of {arena.geometry.block_bytes} bytes in one answer, the limit is "
            f"{BODY_BYTES_MAX} bytes; ask for them in parts"
        )
