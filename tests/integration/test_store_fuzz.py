"""A million malformed frames: each is refused, or is a message and answered; and nothing grows.

Most mutations repair the checksums behind them, or no frame would get further than those. What is a
message all the same goes to a node's server, so that its books see what slips through.
"""

import asyncio
import os
import random
import resource
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from pdserve.errors import FrameError
from pdserve.ids import BlockKey, TicketId
from pdserve.kvstore import admin, protocol
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.wire.frame import (
    BODY_BYTES_MAX,
    HEADER_BYTES,
    MESSAGE_BYTES_MAX,
    Header,
    Kind,
    pack_head,
    pack_header,
    parse_header,
)
from pdserve.wire.inbound import Inbound
from tests.integration.store_nodes import (
    BLOCK_BYTES,
    ELSEWHERE,
    PATIENCE_S,
    Node,
    content,
    filler,
    keys_of,
    read,
    running_node,
)
from tests.unit.kvstore.test_server_fuzz import SLOT_COUNT, Peer, converse, server_in

CODEC = protocol.PROTOCOL
KEYS = tuple(BlockKey(bytes([number]) * 16) for number in range(4))
GREETING = protocol.Greet("fuzz", shares_memory=False, pins=False)
HARMLESS: tuple[object, ...] = (
    GREETING,
    protocol.ClaimPrefix(KEYS),
    protocol.ReadBlocks(1, (0, 1)),
    protocol.ReleaseClaim(1),
    protocol.Reserve(KEYS, 1),
    protocol.Fill(1, 0, (1, 2**64 - 1), verify=True),
    protocol.Commit(1, (3, 4)),
    protocol.Abandon(1),
    protocol.OpenTicket("fuzz", 0, "*", 2, 0),  # type: ignore[arg-type]
    protocol.SealTicket(TicketId("t-1")),
    protocol.AdoptTicket(TicketId("t-1")),
    protocol.ListChanges(0),
    protocol.AskStat(),
    protocol.QuotePrefix(KEYS),
)
"""To whoever else uses the node."""

ALL = (*HARMLESS, admin.EvictAll(None, pinned=False), admin.PinPrefix(KEYS, True, 5))

BATCH = 200  # understood messages that go to a server in one conversation
MEMORY_BYTES_MAX = 64 << 20
CONNECTIONS = 3_000
FRAMES_EACH = 4


class Mutations:
    """Frames that were right before one thing was done to each; all of it follows from the seed."""

    def __init__(self, seed: int, messages: tuple[object, ...]) -> None:
        self._chance = random.Random(seed)
        self._encoded = [CODEC.encode(message) for message in messages]
        self._kinds: dict[str, Callable[[], bytes]] = {
            "bits": self._bits,
            "cut": self._cut,
            "lengths": self._lengths,
            "header": self._header,
            "message": self._message,
            "splice": self._splice,
            "values": self._values,
            "nested": self._nested,
            "noise": self._noise,
        }
        self.counts: Counter[str] = Counter()

    def next(self) -> bytes:
        kind = self._chance.choice(tuple(self._kinds))
        self.counts[kind] += 1
        return self._kinds[kind]()

    def whole(self) -> bytes:
        """A frame that nothing was done to."""
        return self._framed(self._chance.choice(self._encoded))

    def _framed(self, message: bytes) -> bytes:
        body = bytes(self._chance.choice((0, 0, 1, BLOCK_BYTES)))
        return pack_head(Kind.MESSAGE, self._chance.randrange(4), message, len(body)) + body

    def _bits(self) -> bytes:
        frame = bytearray(self.whole())
        for _ in range(self._chance.randint(1, 4)):
            frame[self._chance.randrange(len(frame))] ^= self._chance.randint(1, 255)
        return bytes(frame)

    def _cut(self) -> bytes:
        frame = self.whole()
        return frame[: self._chance.randrange(len(frame))]

    def _lengths(self) -> bytes:
        frame = self.whole()
        header = parse_header(frame[:HEADER_BYTES])
        bounds = (0, 1, header.message_bytes + 1, MESSAGE_BYTES_MAX, BODY_BYTES_MAX)
        sizes = [self._chance.choice(bounds) for _ in range(2)]
        changed = Header(
            header.kind,
            header.call,
            min(sizes[0], MESSAGE_BYTES_MAX),
            sizes[1],
            header.message_checksum,
        )
        return pack_header(changed) + frame[HEADER_BYTES:]

    def _header(self) -> bytes:
        frame = self.whole()
        header = parse_header(frame[:HEADER_BYTES])
        kind = self._chance.choice(tuple(Kind))
        call = self._chance.choice((0, 1, 2**63, 2**64 - 1))
        changed = Header(
            kind, call, header.message_bytes, header.body_bytes, header.message_checksum
        )
        return pack_header(changed) + frame[HEADER_BYTES:]

    def _message(self) -> bytes:
        message = bytearray(self._chance.choice(self._encoded))
        for _ in range(self._chance.randint(1, 3)):
            message[self._chance.randrange(len(message))] = self._chance.randrange(256)
        return self._framed(bytes(message))

    def _splice(self) -> bytes:
        one, other = self._chance.choices(self._encoded, k=2)
        at = self._chance.randrange(1 + min(len(one), len(other)))
        return self._framed(one[:at] + other[at:])

    def _values(self) -> bytes:
        name, *values = msgpack.unpackb(self._chance.choice(self._encoded))
        odd: tuple[object, ...] = (
            None,
            True,
            -1,
            2**64 - 1,
            0.5,
            b"",
            "x",
            [],
            {},
            [[[]]],
            b"k" * 15,
            [1] * 100,
        )
        for _ in range(self._chance.randint(1, 2)):
            at = self._chance.randrange(len(values) + 1)
            values[at : at + self._chance.randrange(2)] = [self._chance.choice(odd)]
        return self._framed(msgpack.packb([name, *values]))

    def _nested(self) -> bytes:
        claims = (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff")
        deep = self._chance.choice((b"\x91", b"\x81\xa0")) * self._chance.randrange(1, 2000)
        return self._framed(deep + self._chance.choice(claims))

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.randrange(200))


def understood(frame: bytes) -> object | None:
    """The message in it; None for one that is refused, or whose rest never comes."""
    inbound = Inbound(CODEC)
    rest = memoryview(frame)
    try:
        while rest:
            buffer = inbound.buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            inbound.filled(count)
            rest = rest[count:]
            if (arrived := inbound.take()) is not None:
                return None if arrived.header.kind is not Kind.MESSAGE else _decoded(arrived.data)
    except FrameError:
        pass
    return None


def _decoded(data: memoryview) -> object:
    return CODEC.decode(data)


@pytest.mark.parametrize("count", [5_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_a_malformed_frame_is_refused_or_a_message_that_is_answered(count: int) -> None:
    seed = int(os.environ.get("FUZZ_SEED", "2027"))
    print(f"seed {seed}")
    mutations = Mutations(seed, ALL)
    waiting: list[tuple[object, bytes]] = []
    served = refused = 0
    peak_bytes = _peak_bytes()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(count):
            message = understood(mutations.next())
            if message is None:
                refused += 1
            else:
                waiting.append((message, b""))
            if len(waiting) == BATCH or number == count - 1:
                _serve(Path(directory), waiting)
                served += len(waiting)
                waiting.clear()
    print(f"{refused} refused, {served} served; {dict(mutations.counts)}")
    assert refused > served > 0, "else this looks at one half of it only"
    assert _peak_bytes() - peak_bytes < MEMORY_BYTES_MAX


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _serve(directory: Path, calls: list[tuple[object, bytes]]) -> None:
    server, core = server_in(directory)
    peer = Peer([call for call in calls if not isinstance(call[0], protocol.Released)])
    asyncio.run(converse(server, peer))
    core.check()
    stat = core.stat()
    assert (stat.claims, stat.writes, stat.tickets) == (0, 0, 0)
    assert stat.slots_free + stat.slots_committed == SLOT_COUNT


# ── a real node ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_outlives_peers_that_send_anything(tmp_path: Path) -> None:
    mutations = Mutations(7, HARMLESS)
    with running_node(tmp_path) as node:
        honest = node.client("honest", remote=True)
        assert honest.put(keys_of("a", 3), 0, filler("a")) == 3
        claim = honest.claim(keys_of("a", 3))
        for number in range(CONNECTIONS // 10):
            _converse_badly(node, mutations, greets=number % 2 == 0)
        before = _resident_bytes(node), _descriptors(node)
        for number in range(CONNECTIONS):
            _converse_badly(node, mutations, greets=number % 2 == 0)
        assert claim.count == 3
        assert read(honest, keys_of("a", 3)) == [content("a", index) for index in range(3)]
        assert _resident_bytes(node) - before[0] < MEMORY_BYTES_MAX
        assert _descriptors(node) <= before[1] + 1  # the last one may be on its way out
        honest.release(claim)
        keeper = StoreAdmin(node.address, host=ELSEWHERE)
        assert keeper.audit().findings == ()
        keeper.close()
        honest.close()


def _converse_badly(node: Node, mutations: Mutations, *, greets: bool) -> None:
    """Until the node has hung up, which it must."""
    host, _, port = node.address.tcp.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connected:
        sent = pack_head(Kind.MESSAGE, 1, CODEC.encode(GREETING)) if greets else b""
        sent += b"".join(mutations.next() for _ in range(FRAMES_EACH))
        try:
            connected.sendall(sent)
            connected.shutdown(socket.SHUT_WR)
            while connected.recv(1 << 16):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had heard enough


def _resident_bytes(node: Node) -> int:
    pages = int(Path(f"/proc/{node.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(node: Node) -> int:
    return len(list(Path(f"/proc/{node.pid}/fd").iterdir()))
