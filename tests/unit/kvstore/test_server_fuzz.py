"""A store node asked for anything that a frame can carry: an answer of its protocol, or an error of
ours; and the books are right afterwards."""

import asyncio
import dataclasses
import tracemalloc
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.errors import Disconnected, ErrorInfo, FrameError, WireError
from pdserve.ids import BlockKey, StoreId, TicketId
from pdserve.kvstore import admin, protocol
from pdserve.kvstore.arena import Geometry, create_arena
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.lending import Lending
from pdserve.kvstore.phases import BOUNDS_S, PHASES, PhaseTimes
from pdserve.kvstore.server import StoreServer
from pdserve.wire.connection import Frame

SLOT_COUNT = 4
HARD_PINS_MAX = 2
BUCKETS = len(BOUNDS_S) + 1
GREETING = protocol.Greet("w", shares_memory=False, pins=False)
BLOCK_BYTES = 64
ANSWERED = (
    protocol.ClaimPrefix,
    protocol.ReadBlocks,
    protocol.CondemnBlock,
    protocol.ReleaseClaim,
    protocol.Reserve,
    protocol.ReservePush,
    protocol.ReserveTail,
    protocol.Fill,
    protocol.Commit,
    protocol.Abandon,
    protocol.OpenTicket,
    protocol.SealTicket,
    protocol.AbortTicket,
    protocol.AdoptTicket,
    protocol.ListChanges,
    protocol.AskStat,
    protocol.QuotePrefix,
    protocol.CondemnSlot,
    protocol.AbortAttempts,
    admin.PinPrefix,
    admin.UnpinPrefix,
    admin.EvictPrompt,
    admin.EvictAll,
    admin.SetDraining,
    admin.Prefetch,
    admin.NotePhases,
    admin.AskReport,
    admin.AskAudit,
)
KNOWN_TICKET = TicketId("the one that was opened last")

small = st.integers(-1, 12)  # what a node has: its claims, writes, positions
numbers = small | st.integers(-(2**63), 2**64 - 1)
keys = st.integers(0, 4).map(lambda number: BlockKey(bytes([number]) * 16)) | st.binary().map(
    BlockKey
)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    int: numbers,
    bool: st.booleans(),
    str: st.sampled_from(["w", "*", ""]) | st.text(),
    TicketId: st.just(KNOWN_TICKET) | st.text().map(TicketId),
    tuple[BlockKey, ...]: st.integers(1, 5).map(
        lambda count: tuple(BlockKey(bytes([number]) * 16) for number in range(count))
    )
    | st.lists(keys, max_size=6).map(tuple),
    tuple[int, ...]: st.lists(numbers, max_size=5).map(tuple),
    tuple[int, ...] | None: st.none() | st.lists(numbers, max_size=5).map(tuple),
    int | None: st.none() | numbers,
    str | None: st.none() | st.text(),
    tuple[bytes, ...]: st.lists(keys.map(bytes) | st.binary(), max_size=3).map(tuple),
    tuple[PhaseTimes, ...]: st.lists(
        st.builds(
            lambda phase, counts, sum_ns: PhaseTimes(phase[0], phase[1], tuple(counts), sum_ns),
            st.sampled_from([*PHASES, ("no", "phase")]),
            st.lists(st.integers(-1, 2**64 - 1), min_size=BUCKETS - 1, max_size=BUCKETS),
            numbers,
        ),
        max_size=2,
    ).map(tuple),
}


def any_of(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    fields: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]  # a name for a plain type, where it has no strategy of its own
        fields[field.name] = VALUES[hint if hint in VALUES else hint.__supertype__]
    return st.builds(cls, **fields)


BODIES = st.sampled_from([0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES]).map(bytes) | st.binary()
CALLS = st.tuples(st.one_of(*map(any_of, (*ANSWERED, protocol.Released))), BODIES)
GREETINGS = st.builds(protocol.Greet, st.just("w"), st.booleans(), st.booleans())


class Peer:
    """A connection whose other end says what it likes, and never waits for an answer."""

    def __init__(
        self,
        calls: list[tuple[Any, bytes]],
        *,
        greeting: protocol.Greet = GREETING,
        numbered: int | None = None,
    ) -> None:
        """``numbered``: how many calls have a number; None: all."""
        self.peer = "unix:anybody"
        self.answers: list[object] = []
        self._calls = [(greeting, b""), *calls]
        self._numbered = len(self._calls) if numbered is None else numbered
        self._ticket = KNOWN_TICKET

    def limit_bodies(self, size: int) -> None:
        self.body_bytes_max = size

    def attend(self, attendant: object) -> None:
        """Nobody attends: every frame is received."""

    def dismiss(self) -> None:
        pass

    async def receive(self) -> Frame:
        await asyncio.sleep(0)  # what is answered late is answered now
        if not self._calls:
            raise Disconnected("that was all")
        message, body = self._calls.pop(0)
        if getattr(message, "ticket", None) == KNOWN_TICKET:
            message = dataclasses.replace(message, ticket=self._ticket)
        is_told = isinstance(message, protocol.Released) or self._numbered == 0
        self._numbered = max(0, self._numbered - 1)
        return Frame(message, memoryview(body), 0 if is_told else 1)

    async def answer(self, frame: Frame, message: object, body: object = ()) -> None:
        assert frame.call != 0, "nobody waits for an answer to this frame"
        self.answers.append(message)
        if isinstance(message, protocol.TicketOpened):
            self._ticket = message.ticket

    async def answer_with_files(self, frame: Frame, message: object, files: object) -> None:
        await self.answer(frame, message)


def server_in(directory: Path) -> tuple[StoreServer, StoreCore]:
    path = directory / "arena"
    path.unlink(missing_ok=True)
    arena = create_arena(path, Geometry(SLOT_COUNT, BLOCK_BYTES), StoreId("s"))
    lending = Lending(path, SLOT_COUNT, can_fence=lambda: True, fence=lambda: True)
    core = StoreCore(SLOT_COUNT, readers=lending, shares={"w": 2.0}, hard_pins_max=HARD_PINS_MAX)
    welcome = protocol.Welcome(StoreId("s"), BLOCK_BYTES, str(path))
    return StoreServer(core, arena, welcome, lending), core


async def converse(server: StoreServer, peer: Any) -> WireError:
    """How the conversation ended."""
    try:
        await server.serve(peer)
    except WireError as error:
        return error
    raise AssertionError("it ends with the connection")


@given(GREETINGS, st.lists(CALLS, max_size=25))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_messages_is_answered(
    tmp_path: Path, greeting: protocol.Greet, calls: list[tuple[Any, bytes]]
) -> None:
    server, core = server_in(tmp_path)
    peer = Peer(list(calls), greeting=greeting)
    ended = asyncio.run(converse(server, peer))
    assert isinstance(ended, Disconnected | FrameError)
    if isinstance(ended, FrameError):
        assert "bytes of keys" in str(ended), "what is only told cannot be refused by an answer"
    encoded = [protocol.PROTOCOL.encode(answer) for answer in peer.answers]
    assert len(encoded) <= 1 + len(calls), "a ticket that waits for ever is not answered"
    core.check()
    stat = core.stat()
    assert stat.slots_free + stat.slots_committed == SLOT_COUNT
    assert (stat.claims, stat.writes, stat.tickets) == (0, 0, 0)
    assert stat.slots_pinned == len(core.pins.hard), "these are no connection's"


@pytest.mark.parametrize("message", [GREETING, protocol.Done(), ErrorInfo("x", "y")])
def test_what_is_no_question_is_refused(tmp_path: Path, message: object) -> None:
    server, _ = server_in(tmp_path)
    peer = Peer([(message, b"")])
    asyncio.run(converse(server, peer))
    assert isinstance(peer.answers[1], ErrorInfo)


@pytest.mark.parametrize("answered", [0, 1])
def test_a_question_that_expects_no_answer_ends_the_connection(
    tmp_path: Path, answered: int
) -> None:
    """The number 0 comes from a peer, so it is a mistake of that peer and no bug of the node's."""
    server, core = server_in(tmp_path)
    peer = Peer([(protocol.AskStat(), b"")], numbered=answered)
    assert isinstance(asyncio.run(converse(server, peer)), FrameError)
    assert len(peer.answers) == answered
    core.check()


def test_a_report_can_be_sent_whatever_times_were_noted(tmp_path: Path) -> None:
    server, _ = server_in(tmp_path)
    times = PhaseTimes(*PHASES[0], (2**64 - 1,) * BUCKETS, 2**64 - 1)
    peer = Peer([*[(admin.NotePhases((times, times)), b"")] * 2, (admin.AskReport(), b"")])
    asyncio.run(converse(server, peer))
    assert isinstance(peer.answers[-1], admin.StoreReport)
    assert protocol.PROTOCOL.encode(peer.answers[-1])


def test_what_the_disk_changes_is_settled_by_the_server(tmp_path: Path) -> None:
    """Else headers would be late, and tickets that the disk made room for would wait."""
    server, core = server_in(tmp_path)
    disk: Any = SimpleNamespace(settle=None)
    served = StoreServer(core, server._arena, server._welcome, server._lending, ssd=disk)
    assert disk.settle == served.settle


def test_what_a_peer_asks_for_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    huge = 2**62
    calls = [
        (protocol.OpenTicket("r", 0, "*", huge, huge), b""),  # type: ignore[arg-type]
        (protocol.Fill(huge, huge, (1,), verify=True), bytes(BLOCK_BYTES)),
        (protocol.ReadBlocks(huge, (huge,)), b""),
        (protocol.Commit(huge, (1,) * 1000), b""),
        (protocol.ListChanges(-huge), b""),
        (protocol.Reserve((BlockKey(bytes(16)),), huge), b""),
    ]
    server, _ = server_in(tmp_path)
    peer = Peer(calls)
    tracemalloc.start()
    try:
        asyncio.run(converse(server, peer))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(peer.answers) == 1 + len(calls)
    assert peak_bytes < 1 << 20
