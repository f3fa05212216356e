"""What every role shares: connections to nodes, calls with a limit, checks, and a way to complain.

An actor asks the metadata where the nodes are, as a worker does, and connects again when a node
has gone. A typed error is an answer; anything else, and any answer that breaks a promise, is a
failure that goes to the stage through a pipe.
"""

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.clock import S
from pdserve.errors import (
    BlockMissing,
    CapacityError,
    ChecksumMismatch,
    FrameError,
    PdserveError,
    StoreUnavailable,
    TicketGone,
)
from pdserve.ids import BlockKey, StoreId
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.masters.metadata import (
    EmbeddedMetadata,
    Member,
    Metadata,
    RedisMetadata,
    Seat,
)
from pdserve.kvstore.pipeline import Corrupt
from pdserve.kvstore.transfer import CALL_TIMEOUT_S
from pdserve.messages import Address
from pdserve.wire.frame import Buffer
from pdserve.wire.hosts import local_host_id
from tests.campaign.board import Board, Number
from tests.campaign.world import BLOCK_BYTES, World
from tests.integration.store_nodes import ELSEWHERE

GRACE_S = 10.0
"""Beyond a call's own limit: it or its node may be stopped, and others want the cores."""

AGAIN_AFTER_S = 0.02
"""Between two attempts to reach a node that is gone."""

PAUSES_RATIO = 0.2
"""Of the blocks that are scribbled over first: those where the writer rests in between."""

VIEWS_RATIO = 0.5
"""Of the blocks that are read: those that are not copied first."""

TEXT_MAX = 1800
"""Characters of a failure; a pipe takes 4096 bytes in one piece, and newlines count twice."""


@dataclass(frozen=True, slots=True)
class Place:
    """A node's id, and where its address is to be found."""

    store_id: StoreId
    metadata: str  # a file, or a URL of Redis
    drills: str  # another one of the same kind

    def connect(self) -> Metadata:
        return metadata_at(self.metadata)


def metadata_at(where: str) -> Metadata:
    is_redis = where.startswith("redis://")
    return RedisMetadata(where) if is_redis else EmbeddedMetadata(Path(where))


@dataclass(frozen=True, slots=True)
class Conduct:
    """How an actor behaves beside its role."""

    remote: bool  # over TCP; else through shared memory
    verify: bool = True
    views: bool = True  # some blocks are looked at where they lie
    tolerates_misses: bool = False  # damage is injected: what was promised may turn out wrong
    damages_the_dead: bool = False  # it is injected into the memory of dead nodes
    corrupt: Corrupt | None = None


class Failed(Exception):
    """Has been reported; the actor ends."""


@dataclass
class Actor:
    index: int
    name: str
    conduct: Conduct
    world: World
    places: Sequence[Place]
    board: Board
    masters: Sequence[str]  # their sockets
    stage: int  # the process that all actors are forks of
    failures: int  # the pipe
    chance: random.Random
    channel: socket.socket | None = None  # between the two sides of a hand-off
    connected_ns: dict[int, int] = field(default_factory=dict)
    _clients: dict[int, StoreClient] = field(default_factory=dict)
    _out: bytearray = field(default_factory=lambda: bytearray(BLOCK_BYTES))
    _metadata: dict[int, Metadata] = field(default_factory=dict)

    # ── saying ───────────────────────────────────────────────────────────────────────────────

    def note(self, text: str) -> None:
        self.board.note(self.index, text)

    def count(self, number: Number, count: int = 1) -> None:
        self.board.add(self.index, number, count)

    def fail(self, kind: str, text: str) -> None:
        """Report, and give up."""
        self.note(f"FAILED {kind}: {text}")
        self._say({"kind": kind}, text)
        raise Failed(text)

    def _say(self, what: dict[str, str], text: str) -> None:
        message = {**what, "actor": self.index, "text": text[-TEXT_MAX:]}
        os.write(self.failures, json.dumps(message).encode() + b"\n")

    # ── calling ──────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def limited(self, what: str, limit_s: float = CALL_TIMEOUT_S) -> Iterator[None]:
        """A call that must return, somehow, within ``limit_s``."""
        self.note(what)
        self.board.put(self.index, Number.CALL_LIMIT_NS, int((limit_s + GRACE_S) * S))
        self.board.put(self.index, Number.CALL_BEGAN_NS, time.monotonic_ns())
        try:
            yield
        finally:
            self.board.put(self.index, Number.CALL_BEGAN_NS, 0)

    def client(self, node: int) -> StoreClient:
        """Raises StoreUnavailable when that node, or its address, cannot be had now."""
        known = self._clients.get(node)
        if known is not None:
            return known
        address = self._address(node)
        with self.limited(f"connect to {self.places[node].store_id}", 2 * CALL_TIMEOUT_S):
            try:
                client = StoreClient(
                    address,
                    host=ELSEWHERE if self.conduct.remote else local_host_id(),
                    owner=self.name,
                    verify=self.conduct.verify,
                    corrupt=self.conduct.corrupt,
                )
            except StoreUnavailable as error:
                self._suspect(address, error)
                raise
        self._clients[node] = client
        self.connected_ns[node] = time.monotonic_ns()
        return client

    def _address(self, node: int) -> Address:
        store_id = self.places[node].store_id
        for member in self.members(node):
            if member.store_id == store_id:
                return member.address
        raise StoreUnavailable(f"{store_id} is no member now")

    def members(self, node: int) -> tuple[Member, ...]:
        """What the node's metadata says; nobody when it cannot be asked now."""
        with self.limited("members"), contextlib.suppress(StoreUnavailable):
            if node not in self._metadata:
                self._metadata[node] = self.places[node].connect()
            return self._metadata[node].members()
        return ()

    def seat(self, node: int) -> Seat | None:
        """Who leads over the node's metadata; None when nobody has, or it cannot be asked now."""
        with self.limited("seat"), contextlib.suppress(StoreUnavailable):
            if node not in self._metadata:
                self._metadata[node] = self.places[node].connect()
            return self._metadata[node].seat()
        return None

    def lost(self, node: int, error: PdserveError) -> None:
        """The connection to a node broke: forget it, and what was held through it."""
        self.count(Number.GONE)
        client = self._clients.pop(node, None)
        if client is not None:
            self._suspect(client.address, error)
            client.close()
        time.sleep(AGAIN_AFTER_S)

    def _suspect(self, address: Address, error: PdserveError) -> None:
        """The stage knows whether it killed that node. If it did not, the node hung up on us."""
        self.note(f"lost {address.tcp}: {error}")
        self._say({"gone": address.tcp}, str(error))

    def is_connected(self, client: StoreClient) -> bool:
        """Whether what was held through ``client`` is held still."""
        return client in self._clients.values()

    def leave(self) -> None:
        """Give everything back."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    # ── checking ─────────────────────────────────────────────────────────────────────────────

    def check_block(
        self, client: StoreClient, claim: Claim, index: int, key: BlockKey | None, wanted: bytes
    ) -> bool:
        """Read a block that a claim promises, and compare every byte; whether it was there."""
        views = self.conduct.views and self.chance.random() < VIEWS_RATIO
        got: Buffer = self._out
        try:
            if views:
                got = client.view(claim, index)
            else:
                client.read(claim, index, memoryview(self._out))
        except (BlockMissing, ChecksumMismatch) as error:
            if not self.conduct.tolerates_misses:
                self.fail("promise", f"block {index} was promised, but {error}")
            self.count(Number.REFUSED)
            return False
        if got != wanted:
            if self.conduct.damages_the_dead:
                client.stat()  # raises where the node is dead, and what it had lent is damaged
            self.fail("wrong bytes", self._difference(claim, index, key, bytes(got), wanted))
        self.count(Number.GETS)
        self.count(Number.VIEWS, views)
        return True

    def _difference(
        self, claim: Claim, index: int, key: BlockKey | None, got: bytes, wanted: bytes
    ) -> str:
        differing = (at for at in range(BLOCK_BYTES) if got[at] != wanted[at])
        first = next(differing, BLOCK_BYTES)  # none: in a view they have changed once more
        whose = next(
            (each.hex() for each, content in self.world.contents.items() if content == got),
            "none, it is torn",
        )
        return (
            f"block {index} of {len(claim.grant.slots)}, key {key.hex() if key else 'tail'}, slot "
            f"{claim.grant.slots[index]}, generation {claim.grant.generations[index]}, differs "
            f"from byte {first} on; these are the bytes of {whose}"
        )

    def check_claim(self, client: StoreClient, claim: Claim, keys: Sequence[BlockKey]) -> None:
        """Every block of a claim of ``keys``' prefix."""
        if claim.count > len(keys):
            self.fail("promise", f"{claim.count} blocks claimed of {len(keys)} asked for")
        with self.limited(f"read {claim.count} blocks"):
            for index in range(claim.count):
                key = keys[index]
                if not self.check_block(client, claim, index, key, self.world.contents[key]):
                    return

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def fill(
        self, keys: Sequence[BlockKey], *, pauses: float = PAUSES_RATIO
    ) -> Callable[[int, memoryview], None]:
        """Writes the right bytes; often other ones first, and some slowly."""

        def fill_block(index: int, out: memoryview) -> None:
            self.write_bytes(self.world.contents[keys[index]], out, pauses)

        return fill_block

    def write_bytes(self, content: bytes, out: memoryview, pauses: float = PAUSES_RATIO) -> None:
        if self.chance.random() < max(0.2, pauses):
            out[: BLOCK_BYTES // 2] = bytes(BLOCK_BYTES // 2)
            if self.chance.random() < pauses:
                time.sleep(self.chance.uniform(0, 0.02))
            out[BLOCK_BYTES // 4 :] = bytes(BLOCK_BYTES - BLOCK_BYTES // 4)
        out[:] = content

    # ── living ───────────────────────────────────────────────────────────────────────────────

    def goes_on(self) -> bool:
        """Not when the stage has ended, in whatever way."""
        return self.board.phase != Board.END and os.getppid() == self.stage

    def live(self, step: Callable[[int], None]) -> None:
        """Repeat ``step`` with a node of this moment's choice, until told to end."""
        while self.goes_on():
            if self.board.phase == Board.QUIET:
                self.leave()
                self.board.put(self.index, Number.QUIET, 1)
                time.sleep(AGAIN_AFTER_S)
                continue
            self.board.put(self.index, Number.QUIET, 0)
            node = self.chance.randrange(len(self.places))
            try:
                step(node)
            except StoreUnavailable as error:
                self.lost(node, error)
            except (CapacityError, TicketGone) as error:
                self.note(f"refused: {error}")
                self.count(Number.REFUSED)
            except (BlockMissing, ChecksumMismatch) as error:
                if not self.conduct.tolerates_misses:
                    self.fail("promise", str(error))
                self.count(Number.REFUSED)
            except FrameError as error:
                self.fail("protocol", str(error))
        self.leave()
