"""What a worker uses of a store node: claim and read blocks, put blocks, hand tickets on.

A ``StoreClient`` is one connection, blocking, for one thread at a time. On the node's host it maps
the arena and claims what is there without asking; elsewhere, or where shared memory is forbidden,
the same calls move bytes over the socket. What it holds (claims, unfinished writes, tickets) lives
as long as its connection, which a forked process shares and must leave alone. When that is gone
every call raises ``StoreUnavailable`` at once: the blocks are lost to this client, not to the
request, which can be computed again; make a new client when the node, or its successor, is there.
"""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

from pdserve.clock import S
from pdserve.errors import (
    ChecksumMismatch,
    StoreError,
    StoreUnavailable,
    WireError,
)
from pdserve.ids import BlockKey, HostId, StoreId, TicketId
from pdserve.kvstore import admin, hazards, protocol
from pdserve.kvstore.answers import ClaimGrant, PrefixQuote, StoreChanges, StoreStat
from pdserve.kvstore.claims import Claim
from pdserve.kvstore.codecs import PayloadCodec, refuse_other
from pdserve.kvstore.counters import new_counters
from pdserve.kvstore.local_reads import LocalReads
from pdserve.kvstore.phases import Phases
from pdserve.kvstore.pipeline import Corrupt
from pdserve.kvstore.transfer import (
    CALL_TIMEOUT_S,
    Closed,
    SharedMemory,
    Transfer,
    patience_s,
    unless_gone,
)
from pdserve.kvstore.ways import local_reads, open_way
from pdserve.kvstore.writing import Writing
from pdserve.messages import Address
from pdserve.wire.blocking import Wait, connect_blocking
from pdserve.wire.frame import Buffer, Frame
from pdserve.wire.tls import TlsContext

CONNECT_TIMEOUT_S = 5.0

NOTE_NS = 1 * S
"""Between two messages about how long things took; they leave with a release."""


class StoreClient(Writing):
    def __init__(
        self,
        address: Address,
        *,
        host: HostId,
        owner: str,
        verify: bool = True,
        shared_memory: bool = True,
        warm: bool = False,
        codec: PayloadCodec | None = None,
        corrupt: Corrupt | None = None,
        ssl_context: TlsContext | None = None,
        token: str = "",
        mooncake: bool = False,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to a node.

        Args:
            host: of this process.
            owner: who this is; tickets name their reader so.
            verify: False delivers bytes as they come.
            shared_memory: False sends bytes over the socket even on the node's host.
            warm: pay for the first touch of shared memory now, beside everything else, for a client
                whose writes somebody waits for.
            codec: how the numbers of blocks are to be written; None takes them as they are.
            corrupt: for tests; called on bytes on their way, after their checksum was taken.
            ssl_context: for a node that speaks TLS over TCP.
            token: for a node that wants one over TCP, see ``capability``.
            mooncake: use one-sided reads instead of the socket, where the node has them.

        Raises:
            StoreUnavailable: nobody answers there, or not to this certificate.
            AccessDenied: the node does not take the token.
            CodecMismatch: its blocks are of another codec.
        """
        self.address = address
        self._local: LocalReads | None = None
        self._transfer: Transfer = CLOSED
        self._staging = memoryview(b"")
        self._viewed: dict[int, Claim] = {}  # claims with views, by ``id``
        try:
            self._connection = connect_blocking(
                address,
                host=host,
                codec=protocol.PROTOCOL,
                timeout_s=connect_timeout_s,
                ssl_context=ssl_context,
            )
        except WireError as error:
            raise StoreUnavailable(f"the store node cannot be reached: {error}") from error
        shares_memory = shared_memory and address.host == host and bool(address.unix_path)
        files: list[int] | None = [] if shares_memory else None
        pins = shares_memory and hazards.register()
        try:
            greeting = protocol.Greet(owner, shares_memory, pins, token)
            welcome: protocol.Welcome
            welcome = self._call(greeting, files=files, timeout_s=connect_timeout_s).message
            self.store_id: StoreId = welcome.store_id
            self.epoch = welcome.epoch
            if codec is not None:
                refuse_other(codec, welcome.codec)
            self.block_bytes = welcome.block_bytes
            self.has_disk = welcome.has_disk
            self._key_prefix = welcome.key_prefix
            self._counters = new_counters()
            self._phases = Phases()
            self._noted_ns = time.perf_counter_ns()
            lent = None if files is None else dict(zip(welcome.files, files, strict=False))
            self._tier = "remote" if lent is None else "memory"
            self._transfer = open_way(
                self._connection,
                self._call,
                welcome,
                lent,
                self._counters,
                mooncake=mooncake,
                verify=verify,
                codec=codec,
                corrupt=corrupt,
                phases=self._phases,
            )
            if lent is not None:
                self._local = local_reads(welcome, lent, self._connection.post)
            if isinstance(self._transfer, SharedMemory) and warm:
                self._transfer.warm()
        except StoreError:
            self.close()
            raise
        finally:
            for descriptor in files or ():
                os.close(descriptor)

    @property
    def counters(self) -> Mapping[str, int]:
        """Totals since this client was made; ``counters`` has the names."""
        return self._counters

    # ── reading ──────────────────────────────────────────────────────────────────────────────────

    def claim(self, keys: Sequence[BlockKey], *, fetch: bool = True, tenant: str = "") -> Claim:
        """Hold the longest prefix of ``keys`` that is stored; it may be empty. Without ``fetch``
        what only the node's disk has is not waited for; what comes up from there goes on the
        account of ``tenant``."""
        began_ns = time.perf_counter_ns()
        claim = self._claim(self._own(keys), fetch=fetch, tenant=tenant)
        self._phases.note(("lookup", self._tier), time.perf_counter_ns() - began_ns)
        return claim

    def _claim(self, keys: Sequence[BlockKey], *, fetch: bool, tenant: str) -> Claim:
        if self._local is not None:
            if not self._connection.is_open():  # what it left in memory is nobody's to lend
                raise StoreUnavailable("the store node is gone")
            found = self._local.claim(keys)
            if found is not None:
                grant, run = found
                self._counters["claims_local"] += 1
                return Claim(grant, tuple(keys[: len(grant.slots)]), run)
        grant = self._call(protocol.ClaimPrefix(tuple(keys), fetch, tenant)).message
        return Claim(grant, tuple(keys[: len(grant.slots)]))

    def quote(self, keys: Sequence[BlockKey]) -> PrefixQuote:
        """What is stored of ``keys``, and where; nothing of it is held."""
        quote: PrefixQuote = self._call(protocol.QuotePrefix(tuple(self._own(keys)))).message
        return quote

    def read(self, claim: Claim, index: int, out: memoryview) -> None:
        """Copy a claimed block to ``out``, which has ``block_bytes`` bytes.

        Its checksum is verified once per block and process in shared memory, each time over a
        socket.

        Raises:
            BlockMissing: it was found to be wrong after it was claimed.
            ChecksumMismatch: it is wrong; from now on nobody finds it.
        """
        key = claim.key_of(index)
        try:
            with unless_gone:
                self._transfer.copy(claim.grant, index, key, self._flat(out))
        except ChecksumMismatch:
            self._condemn(claim, index)
            raise
        self._count_restored()

    def read_many(
        self,
        claim: Claim,
        indices: Sequence[int],
        outs: Sequence[memoryview],
        *,
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """``read`` of several blocks, block ``indices[i]`` to ``outs[i]``; faster over a socket.

        Args:
            deadline_s: for all of them together; a node that took longer counts as gone. None:
                what a node that is alive cannot need.
            cancelled: set by another thread, ends this; some of ``outs`` are written then.

        Raises:
            BlockMissing, ChecksumMismatch: as for ``read``, of the first that cannot be had.
            Cancelled: everything can go on.
        """
        views = [self._flat(out) for out in outs]
        wait = self._wait(len(views), deadline_s, cancelled)
        self._receive(claim, indices, views.__getitem__, lambda _: None, wait)

    def read_each(
        self, claim: Claim, indices: Sequence[int], take: Callable[[int, memoryview], None]
    ) -> None:
        """``read`` of several blocks, each in turn given to ``take(position, bytes)``, which
        must be done with them when it returns; with those that lie in ``memory`` when the claim is
        released.

        Raises:
            BlockMissing, ChecksumMismatch: of the first that ``take`` was not given, or of the last
                that it was given.
        """
        wait = self._wait(len(indices), None, None)
        shared = self._shared()
        if shared is not None:
            self._in_turn(
                claim,
                indices,
                lambda _: None,
                lambda keys, done: shared.each(claim.grant, indices, keys, take, done, wait),
            )
            return
        if len(self._staging) == 0:
            self._staging = memoryview(bytearray(self.block_bytes))
        staging = self._staging
        self._receive(
            claim, indices, lambda _: staging, lambda position: take(position, staging), wait
        )

    def fetch(
        self,
        keys: Sequence[BlockKey],
        outs: Sequence[memoryview],
        *,
        first: int = 0,
        deadline_s: float | None = None,
        cancelled: threading.Event | None = None,
        done: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Copy what is stored of ``keys[first:]`` to ``outs``: claim, read and release at once.

        Args:
            keys: of the whole chain, from its first block.
            done: told of each block, by its place in ``outs``, when it is there and verified.

        Returns:
            how many blocks were stored, from ``keys[first]`` on.

        Raises:
            BlockMissing, ChecksumMismatch, Cancelled: as for ``read_many``.
        """
        views = [self._flat(out) for out in outs]
        assert len(views) == len(keys) - first, f"{len(views)} buffers for {len(keys)} - {first}"

        def count(position: int) -> None:
            self._count_restored()
            done(position)

        wait = self._wait(len(views), deadline_s, cancelled)
        with unless_gone:
            place = views.__getitem__
            fetched = self._transfer.fetch(self._own(keys), first, place, count, wait)
        if fetched is not None:
            return fetched
        claim = self.claim(keys)
        try:
            indices = range(first, claim.count)
            self._receive(claim, indices, place, done, wait)
        finally:
            self.release(claim)
        return len(indices)

    def memory(self) -> Sequence[memoryview]:
        """The arena as this process has it mapped, to be read and to be written, until ``close``;
        nothing over a socket."""
        shared = self._shared()
        return () if shared is None else shared.memory()

    def view(self, claim: Claim, index: int) -> memoryview:
        """A claimed block's bytes where they lie, read-only, until the claim is released; verified
        as by ``read``. Over a socket it is a copy.

        Raises:
            BlockMissing: it was found to be wrong after it was claimed.
            ChecksumMismatch: it is wrong; from now on nobody finds it.
        """
        key = claim.key_of(index)
        try:
            with unless_gone:
                view = self._transfer.view(claim.grant, index, key)
        except ChecksumMismatch:
            self._condemn(claim, index)
            raise
        self._viewed[id(claim)] = claim
        claim.views.append((view, weakref.ref(view.obj)))
        self._count_restored()
        return view

    def release(self, claim: Claim) -> None:
        """Idempotent. A node that is gone holds nothing, so that is no error here.

        Raises:
            BufferError: an array or the like still uses a view; the claim is held further.
        """
        while claim.views:
            view, used = claim.views[-1]
            view.release()
            if used() is not None:
                raise BufferError(
                    f"a view of claim {claim.grant.slots} is still used, by an array or another "
                    "memoryview; drop that first"
                )
            claim.views.pop()
        self._viewed.pop(id(claim), None)
        if claim.run is not None:
            if self._local is not None:  # else it was closed, and its board is nobody's
                self._local.release(claim.run)
        elif claim.grant.claim:
            self._call_unless_gone(protocol.ReleaseClaim(claim.grant.claim))
        if time.perf_counter_ns() - self._noted_ns > NOTE_NS:
            self._noted_ns = time.perf_counter_ns()
            self._call_unless_gone(admin.NotePhases(self._phases.take()))

    def adopt(self, ticket: TicketId) -> Claim:
        """Take over a sealed ticket's blocks as a claim. The ticket is gone.

        Raises:
            TicketGone: it was aborted, has been adopted, is not sealed, or is somebody else's.
        """
        grant: ClaimGrant = self._call(protocol.AdoptTicket(ticket)).message
        return Claim(grant, ())

    # ── what there is ────────────────────────────────────────────────────────────────────────────

    def changes(self, after: int) -> StoreChanges:
        """What entered and left the store since sequence number ``after``, 0 being its start."""
        answer: StoreChanges = self._call(protocol.ListChanges(after)).message
        return answer

    def stat(self) -> StoreStat:
        answer: StoreStat = self._call(protocol.AskStat()).message
        return answer

    def close(self) -> None:
        """Give up everything that is held through this connection. Idempotent.

        Views end, as with the release of their claims: whoever still has one cannot read what
        somebody else writes there by now. Shared memory is unmapped, but for what arrays and the
        like still show of a view: a node that follows one that died waits for that (``adoption``).
        """
        self._connection.close()
        self._local = None
        self._end_views()
        transfer, self._transfer = self._transfer, CLOSED
        transfer.close()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _end_views(self) -> None:
        """Claims that are kept, by whom ever, keep no memory."""
        for claim in self._viewed.values():
            for view, _ in claim.views:
                with contextlib.suppress(BufferError):  # it ends with who uses it
                    view.release()
            claim.views.clear()
        self._viewed.clear()

    def _receive(
        self,
        claim: Claim,
        indices: Sequence[int],
        place: Callable[[int], memoryview],
        done: Callable[[int], None],
        wait: Wait,
    ) -> None:
        receive = self._transfer.receive
        self._in_turn(
            claim,
            indices,
            done,
            lambda keys, done: receive(claim.grant, indices, keys, place, done, wait),
        )

    def _in_turn(
        self,
        claim: Claim,
        indices: Sequence[int],
        done: Callable[[int], None],
        move: Callable[[Sequence[BlockKey | None], Callable[[int], None]], None],
    ) -> None:
        """``move(keys, done)`` reads blocks of a claim and says so of each, in order."""
        keys = [claim.key_of(index) for index in indices]
        count = 0

        def count_on(position: int) -> None:
            nonlocal count
            count += 1
            self._count_restored()
            done(position)

        try:
            with unless_gone:
                move(keys, count_on)
        except ChecksumMismatch:
            self._condemn(claim, indices[count])
            raise

    def _wait(
        self, count: int, deadline_s: float | None, cancelled: threading.Event | None
    ) -> Wait:
        limit_s = patience_s(count * self.block_bytes) if deadline_s is None else deadline_s
        return Wait.of(limit_s, cancelled)

    def _flat(self, out: memoryview) -> memoryview:
        flat = out.cast("B") if out.nbytes != len(out) else out
        assert len(flat) == self.block_bytes, f"{len(flat)} bytes for {self.block_bytes}"
        return flat

    def _condemn(self, claim: Claim, index: int) -> None:
        """Nobody finds this block from now on."""
        grant = claim.grant
        if claim.run is None:
            self._call(protocol.CondemnBlock(grant.claim, index))
        else:
            self._call(protocol.CondemnSlot(grant.slots[index], grant.generations[index]))

    def _count_restored(self) -> None:
        self._counters["blocks_restored"] += 1
        self._counters["bytes_restored"] += self.block_bytes

    def _call(
        self,
        message: object,
        body: Sequence[Buffer] = (),
        *,
        into: memoryview | None = None,
        files: list[int] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Frame:
        if self._local is not None:
            self._local.tell_asked()
        with unless_gone:
            return self._connection.call(message, body, timeout_s=timeout_s, into=into, files=files)


CLOSED = Closed()
