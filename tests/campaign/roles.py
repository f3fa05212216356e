"""Who uses the store in a campaign: readers, writers, the two sides of a hand-off, and who asks.

Each is a class with a ``step``, which does one thing with one node and may be killed or stopped
anywhere in it.
"""

import json
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.errors import StoreUnavailable, TicketGone
from pdserve.ids import BlockKey, StoreId, TicketId, new_request_id
from pdserve.kvstore.answers import StoreChanges
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.metadata import Member
from pdserve.kvstore.masters.protocol import Location
from pdserve.kvstore.pipeline import Fill
from pdserve.kvstore.transfer import CALL_TIMEOUT_S
from tests.campaign.actor import PAUSES_RATIO, Actor
from tests.campaign.board import Number
from tests.campaign.world import tail_bytes

HELD_MAX = 2
"""Claims that a reader keeps while it goes on; each is read once more before it is released."""

TICKET_WAIT_MS = 300
MESSAGE_WAIT_S = 0.05
MESSAGE_BYTES_MAX = 4096


class GaveUp(Exception):
    """A writer's own trouble in the middle of a block."""


class Reader:
    """Claims and reads prefixes, puts what is missing, and holds some claims for a while."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._held: list[tuple[int, StoreClient, Claim, Sequence[BlockKey]]] = []

    def step(self, node: int) -> None:
        actor = self._actor
        client = actor.client(node)
        keys = actor.world.choose(actor.chance)
        with actor.limited(f"claim {len(keys)} blocks at {node}"):
            claim = client.claim(keys)
        actor.count(Number.MISSES, len(keys) - claim.count)
        actor.count(Number.LOCAL, claim.run is not None)
        actor.check_claim(client, claim, keys)
        if claim.count < len(keys) and actor.chance.random() < 0.5:
            self._put(client, keys, claim.count)
        if actor.chance.random() < 0.2:
            self._held.append((node, client, claim, keys))
        else:
            client.release(claim)
        while len(self._held) > HELD_MAX:
            self._let_go(*self._held.pop(0))

    def _put(self, client: StoreClient, keys: Sequence[BlockKey], first: int) -> None:
        actor = self._actor
        with actor.limited(f"put {len(keys)} blocks from {first} on"):
            stored = client.put(keys, first, actor.fill(keys))
        if stored > len(keys) - first:
            actor.fail("promise", f"{stored} of {len(keys) - first} blocks are said to be stored")
        actor.count(Number.PUTS, stored)

    def _let_go(
        self, node: int, client: StoreClient, claim: Claim, keys: Sequence[BlockKey]
    ) -> None:
        """Blocks that were held must be what they were; those of a lost connection are not held."""
        if not self._actor.is_connected(client):
            return
        try:
            self._actor.check_claim(client, claim, keys)
        except StoreUnavailable as error:
            self._actor.lost(node, error)
        else:
            client.release(claim)


class Writer:
    """Puts chains; sometimes gives up in the middle of one, or asks for what cannot be."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def step(self, node: int) -> None:
        actor = self._actor
        client = actor.client(node)
        keys = actor.world.choose(actor.chance)
        # Mostly from its start; else as if the blocks before were there, which nobody knows.
        first = 0 if actor.chance.random() < 0.8 else actor.chance.randrange(len(keys))
        breaks_at = actor.chance.randrange(len(keys)) if actor.chance.random() < 0.1 else -1
        fill = actor.fill(keys)

        def fill_or_break(index: int, out: memoryview) -> None:
            if index == breaks_at:
                raise GaveUp
            fill(index, out)

        with actor.limited(f"put {len(keys)} blocks from {first} on at {node}"):
            try:
                stored = client.put(keys, first, fill_or_break)
            except GaveUp:
                return
        if stored > len(keys) - first:
            actor.fail("promise", f"{stored} of {len(keys) - first} blocks are said to be stored")
        actor.count(Number.PUTS, stored)
        # Some of a writer's time is spent elsewhere, or it would take every turn of the node's.
        time.sleep(actor.chance.uniform(0, 0.004))


@dataclass(frozen=True, slots=True)
class Offer:
    """What a prefill tells its decode: a ticket, and what decode should do with it."""

    ticket: TicketId
    node: int
    node_tcp: str  # which incarnation of the node
    keys: tuple[BlockKey, ...]
    to_abort: bool
    sealed_ns: int

    def encode(self) -> bytes:
        keys = [key.hex() for key in self.keys]
        rest = [self.ticket, self.node, self.node_tcp, self.to_abort, self.sealed_ns]
        return json.dumps([keys, *rest]).encode()

    @staticmethod
    def decode(data: bytes) -> "Offer":
        keys, ticket, node, node_tcp, to_abort, sealed_ns = json.loads(data)
        parsed = tuple(BlockKey(bytes.fromhex(key)) for key in keys)
        return Offer(ticket, node, node_tcp, parsed, to_abort, sealed_ns)


class Prefill:
    """Opens a ticket, pushes in chunks, seals, and tells its decode; or aborts somewhere, or has
    it aborted by the other side while it writes."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def step(self, node: int) -> None:
        actor = self._actor
        client = actor.client(node)
        keys = actor.world.choose(actor.chance)
        with actor.limited(f"open a ticket at {node}", CALL_TIMEOUT_S + TICKET_WAIT_MS / 1000):
            ticket = client.open_ticket(
                new_request_id(),
                0,
                reader=actor.name.replace("prefill", "decode"),
                block_count=len(keys) + 1,
                wait_ms=actor.chance.choice((0, TICKET_WAIT_MS)),
            )
        may_be_aborted = actor.chance.random() < 0.3
        if may_be_aborted:
            self._tell(Offer(ticket, node, client.address.tcp, (), True, 0))
        aborts_at = actor.chance.randint(0, 4) if actor.chance.random() < 0.3 else -1
        try:
            pauses = 0.5 if may_be_aborted else PAUSES_RATIO  # time for the abort to come between
            fill = actor.fill(keys, pauses=pauses)
            done = self._hand_over(client, ticket, keys, aborts_at, fill)
        except TicketGone as error:
            seal_failed = "reader" in str(error) and "not connected" in str(error)
            if not may_be_aborted and not seal_failed:
                actor.fail("promise", f"nobody aborted {ticket}, but {error}")
            actor.count(Number.ABORTED)
            return
        if not done:
            client.abort(ticket)
            actor.count(Number.ABORTED)
        elif not may_be_aborted:
            sealed_ns = time.monotonic_ns()
            self._tell(Offer(ticket, node, client.address.tcp, tuple(keys), False, sealed_ns))

    def _hand_over(
        self,
        client: StoreClient,
        ticket: TicketId,
        keys: Sequence[BlockKey],
        aborts_at: int,
        fill: Fill,
    ) -> bool:
        """Whether it is sealed; False when it gave up before step ``aborts_at``."""
        actor = self._actor
        half = len(keys) // 2
        steps: list[tuple[str, Callable[[], None]]] = [
            ("push to", lambda: client.push(ticket, keys[:half], 0, fill)),
            ("push more to", lambda: client.push(ticket, keys, half, fill)),
            ("push the tail of", lambda: client.push_tail(ticket, self._fill_tail(ticket))),
            ("seal", lambda: client.seal(ticket)),
        ]
        for index, (what, do) in enumerate(steps):
            if index == aborts_at:
                return False
            with actor.limited(f"{what} {ticket}"):
                do()
        return aborts_at != len(steps)

    def _fill_tail(self, ticket: TicketId) -> Callable[[memoryview], None]:
        return lambda out: self._actor.write_bytes(tail_bytes(ticket), out)

    def _tell(self, offer: Offer) -> None:
        assert self._actor.channel is not None
        try:
            self._actor.channel.send(offer.encode(), socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._actor.note("decode is not listening")


class Decode:
    """Adopts what its prefill sealed, and compares every byte; or aborts it."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        assert actor.channel is not None
        actor.channel.settimeout(MESSAGE_WAIT_S)

    def step(self, node: int) -> None:
        actor = self._actor
        assert actor.channel is not None
        for each in range(len(actor.places)):  # so that tickets for it can be sealed
            try:
                actor.client(each)
            except StoreUnavailable as error:
                actor.lost(each, error)
        try:
            offer = Offer.decode(actor.channel.recv(MESSAGE_BYTES_MAX))
        except TimeoutError:
            return
        try:
            self._take(offer)
        except StoreUnavailable as error:
            actor.lost(offer.node, error)

    def _take(self, offer: Offer) -> None:
        actor = self._actor
        client = actor.client(offer.node)
        if offer.to_abort or actor.chance.random() < 0.2:
            with actor.limited(f"abort {offer.ticket}"):
                client.abort(offer.ticket)
            actor.count(Number.ABORTED)
            return
        try:
            with actor.limited(f"adopt {offer.ticket}"):
                claim = client.adopt(offer.ticket)
        except TicketGone as error:
            was_here = actor.connected_ns[offer.node] < offer.sealed_ns
            if was_here and client.address.tcp == offer.node_tcp:
                actor.fail("promise", f"{offer.ticket} was sealed for this reader, but {error}")
            actor.count(Number.LOST)
            return
        self._check(client, claim, offer)
        client.release(claim)

    def _check(self, client: StoreClient, claim: Claim, offer: Offer) -> None:
        actor = self._actor
        if (claim.count, claim.has_tail) != (len(offer.keys), True):
            actor.fail("promise", f"{claim.count} of {len(offer.keys)} blocks of {offer.ticket}")
        with actor.limited(f"read {claim.count} blocks of {offer.ticket}"):
            for index, key in enumerate(offer.keys):
                wanted = actor.world.contents[key]
                if not actor.check_block(client, claim, index, key, wanted):
                    return
            if actor.check_block(client, claim, claim.count, None, tail_bytes(offer.ticket)):
                actor.count(Number.ADOPTED)


class Scout:
    """Follows a node's feed, and the metadata: an index is closed under prefixes, epochs grow."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._node_tcp = ""
        self._sequence = 0
        self._stored: set[BlockKey] = set()
        self._epochs: dict[str, int] = {}

    def step(self, node: int) -> None:
        actor = self._actor
        self._check_epochs(actor.members(node))
        if node == 0:  # one without a disk, which may lose a parent that the arena still has
            client = actor.client(node)
            with actor.limited("changes"):
                self._follow(client.address.tcp, client.changes(self._sequence))
        time.sleep(0.01)

    def _check_epochs(self, members: Sequence[Member]) -> None:
        for member in members:
            known = self._epochs.get(member.store_id, 0)
            if member.epoch < known:
                self._actor.fail(
                    "fence", f"{member.store_id} is a member under {member.epoch} after {known}"
                )
            self._epochs[member.store_id] = member.epoch

    def _follow(self, node_tcp: str, changes: StoreChanges) -> None:
        if node_tcp != self._node_tcp:  # another incarnation counts from its own start
            self._node_tcp, self._sequence, self._stored = node_tcp, 0, set()
            return
        if not changes.complete:
            self._stored.clear()
        self._stored -= set(changes.removed)
        self._stored |= set(changes.added)
        self._sequence = changes.sequence
        parents = self._actor.world.parents
        for key in self._stored:
            if key not in parents:
                self._actor.fail("closure", f"{key.hex()} is stored, and nobody ever wrote it")
            parent = parents[key]
            if parent is not None and parent not in self._stored:
                self._actor.fail("closure", f"{key.hex()} is stored without {parent.hex()}")


class Locator:
    """Asks the masters where a chain is, and reads it there: what they say may be old, but no
    epoch falls, and what is read is right."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._masters = MasterClient(actor.masters, name=actor.name)
        self._led_under = 0

    def step(self, _: int) -> None:
        actor = self._actor
        node = len(actor.places) - 1  # whose table the masters look at
        keys = actor.world.choose(actor.chance)
        with actor.limited(f"locate {len(keys)} blocks"):
            try:
                locations = self._masters.locate(keys)
            except StoreUnavailable as error:
                actor.note(f"no master: {error}")
                locations = ()
        self._check(locations, len(keys), actor.places[node].store_id)
        self._check_seat(node)
        if locations:
            actor.count(Number.LOCATED)
            client = actor.client(node)
            with actor.limited(f"claim {len(keys)} located blocks"):
                claim = client.claim(keys)
            actor.check_claim(client, claim, keys)
            client.release(claim)
        time.sleep(actor.chance.uniform(0, 0.02))

    def _check(self, locations: Sequence[Location], count: int, store_id: StoreId) -> None:
        for each in locations:
            if each.store_id != store_id or not 0 < each.count <= count:
                self._actor.fail("promise", f"{count} blocks of a chain are located at {each}")

    def _check_seat(self, node: int) -> None:
        seat = self._actor.seat(node)
        if seat is None:
            return
        if seat.epoch < self._led_under:
            self._actor.fail("fence", f"{seat} after epoch {self._led_under}")
        self._led_under = seat.epoch


ROLES: dict[str, Callable[[Actor], Reader | Writer | Prefill | Decode | Scout | Locator]] = {
    "reader": Reader,
    "writer": Writer,
    "prefill": Prefill,
    "decode": Decode,
    "scout": Scout,
    "locator": Locator,
}


def act(actor: Actor) -> None:
    """Live as the role that the actor's name begins with."""
    actor.live(ROLES[actor.name.partition("-")[0]](actor).step)
