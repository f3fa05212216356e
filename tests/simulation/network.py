"""Byte streams between simulated processes: late, in pieces, stalled, or broken half way.

A stream is what a kernel gives: bytes arrive in order and once, or the connection ends. So loss is
a stall, then the end after ``UNACKNOWLEDGED_NS``, as the socket options of ``wire.endpoint`` have
it; what was under way is lost. Duplicates and another order are what the layers above make of an
end: they connect again and repeat what has no receipt, while other connections go on.

A partition is of one direction between two hosts. Processes of one host always reach each other.
The end of a connection crosses it as little as bytes do: who hung up, or died, has ended, and the
other side goes on with a connection that leads nowhere until the way is open, or until its own
kernel has had no answer for ``UNACKNOWLEDGED_NS``. What it writes meanwhile is lost.

A kernel takes ``SOCKET_BYTES`` for who does not read; then the writer has to wait, as over TCP, and
where nothing is read for ``UNACKNOWLEDGED_NS`` a connection to another host ends.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from pdserve.clock import MS, US, S
from tests.simulation.loop import SimProcess, VirtualLoop, current_process

UNACKNOWLEDGED_NS = 11 * S
SOCKET_BYTES = 2_000
"""Far less than in earnest, as everything here is."""

LOCAL_NS = (20 * US, 200 * US)
REMOTE_NS = (100 * US, 2 * MS)


class Network:
    def __init__(self, loop: VirtualLoop, dice: random.Random) -> None:
        self.loop = loop
        self.dice = dice
        self.slow_until_ns = 0  # until then remote bytes take ``slow_ns`` more
        self.slow_ns = 0
        self._servers: dict[str, Server] = {}
        self._ports = itertools.count(20_000)
        self._blocked: dict[tuple[str, str], int] = {}  # (from, to) hosts, until when
        self.pairs: list[Pair] = []

    # ── what breaks ──────────────────────────────────────────────────────────────────────────────

    def block(self, source: str, target: str, until_ns: int) -> None:
        self._blocked[source, target] = until_ns
        unanswered_ns = self.loop.now_ns + UNACKNOWLEDGED_NS
        if until_ns > unanswered_ns:
            crossing = [p for p in self.pairs if p.is_open and p.hosts == {source, target}]
            self.loop.at(unanswered_ns, lambda: self._give_up(crossing), None)

    def _give_up(self, pairs: list["Pair"]) -> None:
        """No kernel has had an answer, quiet as the connection may have been. One direction is
        enough for that: an answer needs both."""
        for pair in pairs:
            if pair.is_open and self.is_apart(*pair.hosts):
                for end in pair.ends:
                    end.fail(TimeoutError(110, "Connection timed out"))

    def heal(self) -> None:
        self._blocked.clear()
        self.slow_until_ns = 0

    def blocked_until_ns(self, source: str, target: str) -> int:
        return self._blocked.get((source, target), 0)

    def reset_one(self, note: Callable[[str], None], *, tries: int = 100) -> None:
        """Breaks a connection on which something is under way; how much of it still arrives is
        left to the dice. Where all are quiet it looks again a little later."""
        now_ns = self.loop.now_ns
        busy = [
            pair
            for pair in self.pairs
            if pair.is_open and max(end.arrives_ns for end in pair.ends) > now_ns
        ]
        if busy:
            pair = self.dice.choice(busy)
            note(f"RESET {pair.name}")
            pair.reset()
        elif tries:
            later_ns = now_ns + self.dice.randrange(100 * US, MS)
            self.loop.at(later_ns, lambda: self.reset_one(note, tries=tries - 1), None)

    def cut_off(self, host: str) -> None:
        """Its processes are about to die, and no kernel is left to tell anybody elsewhere."""
        for pair in self.pairs:
            if pair.is_open and {host} < pair.hosts:
                pair.cut_off()

    def break_all_to(self, process: SimProcess) -> None:
        """Those that it has accepted, as where a path fails: nothing of what is under way arrives,
        receipts as little as what they are for. Those that it has opened itself go on: were its
        link to the router among them, a gateway would begin everything again."""
        for pair in self.pairs:
            if pair.is_open and pair.ends[1].process is process:
                for end in pair.ends:
                    end.is_deaf = True
                pair.reset()

    # ── what asyncio asks for ────────────────────────────────────────────────────────────────────

    def listen(self, factory: Callable[[], Any], where: str) -> "Server":
        process = current_process()
        assert process is not None
        server = Server(self, factory, where, process)
        self._servers[where] = server
        process.on_death.append(server.close)
        return server

    def listen_tcp(self, factory: Callable[[], Any], host: str) -> "Server":
        return self.listen(factory, f"{host}:{next(self._ports)}")

    def forget(self, server: "Server") -> None:
        if self._servers.get(server.where) is server:
            del self._servers[server.where]

    async def connect(self, factory: Callable[[], Any], where: str) -> tuple[Any, Any]:
        client = current_process()
        assert client is not None
        await asyncio.sleep(self.delay_ns(client.host, client.host) / S)
        server = self._servers.get(where)
        while server is not None and self.is_apart(client.host, server.process.host):
            await asyncio.sleep(0.1)  # the caller has a limit
            server = self._servers.get(where)
        if server is None or not server.process.alive:
            raise ConnectionRefusedError(111, "Connection refused")
        protocol = factory()
        pair = Pair(self, client, server.process)
        self.pairs.append(pair)
        pair.open(protocol, server.factory)
        return pair.ends[0], protocol

    def is_apart(self, one: str, other: str) -> bool:
        now_ns = self.loop.now_ns
        return max(self.blocked_until_ns(one, other), self.blocked_until_ns(other, one)) > now_ns

    def delay_ns(self, source: str, target: str) -> int:
        if source == target:
            return self.dice.randrange(*LOCAL_NS)
        slow_ns = 0
        if self.loop.now_ns < self.slow_until_ns:
            slow_ns = self.dice.randrange(self.slow_ns)
        return self.dice.randrange(*REMOTE_NS) + slow_ns


class Server:
    """What a listener holds: as much of ``asyncio.Server`` as it uses."""

    def __init__(
        self, network: Network, factory: Callable[[], Any], where: str, process: SimProcess
    ) -> None:
        self.factory = factory
        self.where = where
        self.process = process
        self._network = network

    @property
    def sockets(self) -> list["Server"]:
        return [self]

    def getsockname(self) -> tuple[str, int]:
        host, _, port = self.where.rpartition(":")
        return host, int(port)

    def close(self) -> None:
        self._network.forget(self)


class Pair:
    """One connection."""

    def __init__(self, network: Network, client: SimProcess, server: SimProcess) -> None:
        self.network = network
        self.name = f"{client.name}-{server.name}"
        self.is_open = True
        self._is_cut_off = False
        self.ends = (End(self, client), End(self, server))
        self.ends[0].peer, self.ends[1].peer = self.ends[1], self.ends[0]
        self.hosts = {client.host, server.host}
        for end in self.ends:
            end.process.on_death.append(partial(self._died, end))

    def open(self, protocol: Any, server_factory: Callable[[], Any]) -> None:
        client, server = self.ends
        client.protocol = protocol
        protocol.connection_made(client)
        server.protocol = server.process.context.run(server_factory)
        now_ns = self.network.loop.now_ns
        self.network.loop.at(
            now_ns, lambda: server.protocol.connection_made(server), server.process
        )
        server.arrives_ns = now_ns

    def cut_off(self) -> None:
        self._is_cut_off = True
        loop = self.network.loop
        loop.at(loop.now_ns + UNACKNOWLEDGED_NS, self.reset, None)

    def _died(self, end: "End") -> None:
        if not self._is_cut_off:
            end.fail(None)

    def reset(self) -> None:
        """Both ends learn of it; of what is under way a prefix arrives."""
        if not self.is_open:
            return
        self.is_open = False
        for end in self.ends:
            end.hear_of_end()


class End:
    """One side of a connection, and its transport."""

    peer: "End"

    def __init__(self, pair: Pair, process: SimProcess) -> None:
        self.pair = pair
        self.process = process
        self.protocol: Any = None
        self.arrives_ns = 0  # when what was sent last to this end is there
        self.lost = False
        self.is_deaf = False  # nothing arrives any more; it will learn of it
        self._severed = False  # what was written last never arrives
        self._closing = False
        self._paused = False
        self._buffered: list[bytes] = []  # arrived and not read
        self._unread = 0  # bytes that were sent to this end, and are not read
        self._read_count = 0  # how often it has read
        self._network = pair.network

    # ── a transport ──────────────────────────────────────────────────────────────────────────────

    def write(self, data: bytes | memoryview) -> None:
        if self.lost or self._closing or not self.pair.is_open:
            return
        network, peer, sent = self._network, self.peer, bytes(data)
        now_ns = network.loop.now_ns
        source, target = self.process.host, peer.process.host
        blocked_ns = network.blocked_until_ns(source, target)
        if blocked_ns > now_ns + UNACKNOWLEDGED_NS and not self._severed:
            self._severed = True
            timed_out = TimeoutError(110, "Connection timed out")
            network.loop.at(now_ns + UNACKNOWLEDGED_NS, lambda: self.fail(timed_out), None)
        if self._severed:  # a stream has no gaps: what follows the lost is lost, healed or not
            return
        when_ns = max(now_ns, blocked_ns) + network.delay_ns(source, target)
        peer.arrives_ns = max(peer.arrives_ns, when_ns)
        cut = network.dice.randrange(1, len(sent)) if len(sent) > 64 and when_ns & 7 == 0 else 0
        for piece in (sent[:cut], sent[cut:]):
            if piece:
                network.loop.at(peer.arrives_ns, partial(peer.arrive, piece), peer.process)
        peer.expect(len(sent))

    def expect(self, size: int) -> None:
        """So many bytes are on their way to this end."""
        was_full = self._unread > SOCKET_BYTES
        self._unread += size
        if self._unread <= SOCKET_BYTES or was_full:
            return
        self.peer.protocol.pause_writing()
        if self.process.host != self.peer.process.host:
            loop, read_count = self._network.loop, self._read_count
            until_ns = loop.now_ns + UNACKNOWLEDGED_NS
            loop.at(until_ns, lambda: self._reset_if_stuck(read_count), None)

    def _reset_if_stuck(self, read_count: int) -> None:
        if self._unread > SOCKET_BYTES and self._read_count == read_count:
            self.peer.fail(TimeoutError(110, "Connection timed out"))

    def close(self) -> None:
        """What was written still arrives, then the peer sees the end."""
        if self._closing or self.lost:
            return
        self._closing = True
        network, peer, now_ns = self._network, self.peer, self._network.loop.now_ns
        way_ns = network.blocked_until_ns(self.process.host, peer.process.host)
        if self._severed or way_ns > now_ns + UNACKNOWLEDGED_NS:
            network.loop.at(now_ns + UNACKNOWLEDGED_NS, peer.hear_of_end, None)
        else:
            network.loop.at(
                max(way_ns, now_ns, peer.arrives_ns) + 1, peer.end_of_file, peer.process
            )
        network.loop.at(now_ns, lambda: self._lost(None), self.process)

    def abort(self) -> None:
        self.fail(None)

    def is_closing(self) -> bool:
        return self._closing or self.lost

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        buffered, self._buffered = self._buffered, []
        for data in buffered:
            self._feed(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: Any = None, low: Any = None) -> None:
        """As ``Connection`` sets them: whoever has written too much waits for the kernel."""

    def go_on(self) -> None:
        if not self.lost and self.peer.expects_little:
            self.protocol.resume_writing()

    @property
    def expects_little(self) -> bool:
        return self._unread <= SOCKET_BYTES

    # ── what arrives ─────────────────────────────────────────────────────────────────────────────

    def arrive(self, data: bytes) -> None:
        if self.lost or self._closing or self.is_deaf:
            return
        if self._paused:
            self._buffered.append(data)
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        was_full = self._unread > SOCKET_BYTES
        self._unread -= len(data)
        self._read_count += 1
        if was_full and self._unread <= SOCKET_BYTES:
            loop, writer = self._network.loop, self.peer
            loop.at(loop.now_ns, writer.go_on, writer.process)
        while data:
            buffer = self.protocol.get_buffer(-1)
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            self.protocol.buffer_updated(count)
            data = data[count:]

    # ── how it ends ──────────────────────────────────────────────────────────────────────────────

    def end_of_file(self) -> None:
        self.pair.is_open = False
        self._lost(None)

    def fail(self, error: Exception | None) -> None:
        """This side has ended, now: it hung up, died, or has had no answer for too long."""
        if self.pair.is_open and not self._closing:
            self.pair.is_open = False
            self.peer.hear_of_end()
        self._closing = True
        loop = self._network.loop
        loop.at(loop.now_ns, lambda: self._lost(error), self.process)

    def hear_of_end(self) -> None:
        """Some time; what has not arrived by then never does."""
        network, now_ns = self._network, self._network.loop.now_ns
        here, there = self.process.host, self.peer.process.host
        way_ns, unanswered_ns = network.blocked_until_ns(there, here), now_ns + UNACKNOWLEDGED_NS
        if way_ns > now_ns:
            # What waits behind a partition is in the kernel of who has ended, and goes on only
            # where that one has closed in order. Its end is not said twice: it may take until
            # somebody asks.
            self.is_deaf = self.is_deaf or network.dice.random() < 0.5
            when_ns = way_ns + network.delay_ns(there, here)
            if network.dice.random() < 0.5 and when_ns < unanswered_ns:
                when_ns = network.dice.randrange(when_ns, unanswered_ns)
            when_ns = min(when_ns, unanswered_ns)
        elif self.peer.process.alive and network.dice.random() < 0.5:
            when_ns = max(now_ns, self.arrives_ns)  # all of it came before the end
        else:
            # The news of a death travels as bytes do: two at once are not heard of at once.
            source = here if self.peer.process.alive else there
            when_ns = now_ns + network.delay_ns(source, here)
        error = ConnectionResetError(104, "Connection reset by peer")
        network.loop.at(when_ns, lambda: self._lost(error), self.process)

    def _lost(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)


@contextlib.contextmanager
def no_socket(transport: Any) -> Iterator[Any]:
    """In the place of ``wire.direct.duplicate_of``."""
    yield transport


def peer_of(end: End) -> str:
    """In the place of ``wire.endpoint.set_up``."""
    local = end.process.host == end.peer.process.host
    return f"unix:pid={end.peer.process.name}" if local else f"tcp:{end.peer.process.name}"
