"""A leading master's shell: asks every member what came and went, and has blocks copied.

One task per member holds a connection to its node and asks ``AskDeltas`` again and again. A node
that breaks off loses its locations at once; one that answers nothing for ``DEAD_NS`` loses its
membership, and finds that out by itself if it lives. Everything that is said goes out under this
leader's epoch. A node that refuses it has heard of a later one: then this master's time is over,
which ``Replaced`` says.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pdserve.clock import MS, Clock, S, monotonic
from pdserve.errors import (
    DeadlineExceeded,
    PdserveError,
    StaleEpoch,
    StoreError,
    WireError,
)
from pdserve.ids import HostId, StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.masters.core import EVERYTHING, Host, MasterCore
from pdserve.kvstore.masters.mastering import (
    AskDeltas,
    AskParents,
    Copied,
    CopyChain,
    Deltas,
    Parents,
    children_in,
    pack_ages,
)
from pdserve.kvstore.masters.mastering import Refused as RefusedByNode
from pdserve.kvstore.masters.metadata import Member, Metadata, Seat
from pdserve.kvstore.masters.protocol import (
    Locate,
    Located,
    Location,
    MasterReport,
    MemberReport,
    Vacate,
    Vacated,
)
from pdserve.kvstore.masters.replication import Copy, Replication
from pdserve.kvstore.masters.vacating import Chains, Vacating
from pdserve.kvstore.security import Credentials
from pdserve.wire.connection import Connection, connect
from pdserve.wire.frame import Frame

POLL_S = 0.1
"""Between two questions to one node; a question takes it about 0.1 ms."""

ANSWER_S = 2.0
INVENTORY_S = 10.0
"""For one answer; sixteen million keys take a node most of a second."""

DEAD_NS = 2 * S
"""From the first question that a node did not answer until it is a member no more."""

RETRY_S = 0.1
MEMBERS_S = 0.25
COPY_S = 30.0
COPIES_LOOK_S = 1.0
DRAINING_HEARD_S = 2.0
"""Until a node that drains has said so itself; one that does not drain is not waited for longer."""

LOCATE_KEYS_MAX = 65_536
"""Blocks of a million tokens."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Replaced(Exception):
    """Not an error: a node obeys a later epoch, which is the argument."""

    @property
    def epoch(self) -> int:
        return int(self.args[0])


class Leader:
    """One term of office: begun with an epoch, over with it. Run by ``run``, in one event loop."""

    def __init__(
        self,
        master: str,
        epoch: int,
        metadata: Metadata,
        *,
        host: HostId,
        credentials: Credentials,
        clock: Clock = monotonic,
    ) -> None:
        self.epoch = epoch
        self.core = MasterCore()
        self._master = master
        self._metadata = metadata
        self._host = host
        self._credentials = credentials
        self._clock = clock
        self._began_ns = clock()
        self._whole_ns: int | None = None
        self._replication = Replication()
        self._tasks: dict[Member, asyncio.Task[None]] = {}
        self._connections: dict[StoreId, Connection] = {}
        self._replaced = asyncio.Event()
        self._later_epoch = 0
        self._vacating = asyncio.Lock()
        self._building = asyncio.Lock()
        """Held by a build, and by whoever tells the core of blocks: none are told of meanwhile."""

    async def run(self) -> None:
        """Until cancelled.

        Raises:
            Replaced: another master leads.
        """
        async with asyncio.TaskGroup() as group:
            try:
                group.create_task(self._follow_members())
                group.create_task(self._replicate())
                await self._replaced.wait()
                raise Replaced(self._later_epoch)
            finally:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # ── for those who ask ────────────────────────────────────────────────────────────────────────

    def locate(self, message: Locate) -> Located:
        keys = split_keys(message.keys[: LOCATE_KEYS_MAX * 16])
        found = self.core.holders(keys)
        if found:
            self._replication.read(keys[: found[0][1]], message.reads, self._clock())
        return Located(
            tuple(
                Location(host.member.store_id, host.member.address, host.member.epoch, count)
                for host, count in found
            )
        )

    def report(self, seat: Seat | None) -> MasterReport:
        index, counters = self.core.index, self.core.counters
        blocks = index.counts()
        whole_ns = self._whole_ns
        return MasterReport(
            master=self._master,
            epoch=self.epoch,
            seat=seat,
            members=tuple(
                MemberReport(
                    store_id=host.member.store_id,
                    address=host.member.address,
                    epoch=host.member.epoch,
                    is_in=host.is_in,
                    is_draining=host.is_draining,
                    blocks=blocks[host.number],
                    slots_free=host.slots_free,
                )
                for host in sorted(self.core.hosts, key=lambda each: each.member.store_id)
            ),
            blocks=index.block_count(),
            locations=index.location_count(),
            index_bytes=index.nbytes,
            is_whole=self.core.is_whole,
            rebuild_ms=0 if whole_ns is None else (whole_ns - self._began_ns) // MS,
            replicas=counters["replicas"],
            moved=counters["moved"],
            gaps=counters["gaps"],
            removed=counters["removed"],
            fenced=counters["fenced"],
        )

    async def vacate(self, message: Vacate) -> Vacated:
        """Raises StoreError for who is no member, StoreUnavailable when the node breaks off."""
        until_s = time.monotonic() + message.deadline_ms * MS / S
        source = self.core.host(message.store_id)
        if source is None:
            raise StoreError(f"{message.store_id} is no member of the store")
        await self._draining_heard(message.store_id, until_s)
        vacating = Vacating(source)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + _left(until_s)):
                while self.core.host(message.store_id) is source:
                    # Looked at before what is there, which is then all that those before brought.
                    may_bring_more = source.is_draining and source.under_way
                    async with self._vacating:
                        await self._move(vacating, source, until_s)
                    if not may_bring_more:
                        break
                    await asyncio.sleep(POLL_S / 4)
        self.core.counters["moved"] += vacating.moved
        left = self.core.only_at(message.store_id)
        return Vacated(vacating.moved, len(left), len(vacating.outweighed.intersection(left)))

    async def _move(self, vacating: Vacating, source: Host, until_s: float) -> None:
        """What only this node has, as far as it was not tried before."""
        alone = self.core.only_at(source.member.store_id)
        if not vacating.unseen(alone):
            return
        vacating.begin(await self._chains(source), alone)
        while (copy := vacating.next_copy(self.core.holders, self.core.hosts)) is not None:
            vacating.done(copy, await self._copy(copy, until_s))

    async def _draining_heard(self, store_id: StoreId, until_s: float) -> None:
        """Until the node's own word is that it drains: its last blocks were told of before that, or
        with it. Without this, what came a moment before the drain would be taken for moved."""
        until_s = min(until_s, time.monotonic() + DRAINING_HEARD_S)
        while (host := self.core.host(store_id)) is not None and not host.is_draining:
            if time.monotonic() >= until_s:
                break
            await asyncio.sleep(POLL_S / 4)

    # ── members ──────────────────────────────────────────────────────────────────────────────────

    async def _follow_members(self) -> None:
        while True:
            try:
                members = await asyncio.to_thread(self._metadata.members)
            except StoreError as error:  # those known go on; nobody can join or leave meanwhile
                _log.debug("the members are not to be had: %s", error)
            else:
                turnover = self.core.set_members(members)
                for member in turnover.left:
                    task = self._tasks.pop(member, None)
                    if task is not None:
                        task.cancel()
                for member in turnover.joined:
                    self._tasks[member] = asyncio.create_task(self._follow(member))
                self._note_whole()
            await asyncio.sleep(MEMBERS_S)

    async def _follow(self, member: Member) -> None:
        """What came and went at one node, until it is a member no more."""
        silent_ns: int | None = None
        """Since when nothing comes, counted from the first failure: this process may have been
        stopped itself."""

        def answered() -> None:
            nonlocal silent_ns
            silent_ns = None

        while True:
            try:
                async with self._connected(member) as connection:
                    while True:
                        await self._ask_deltas(connection, member, answered)
                        await asyncio.sleep(POLL_S)
            except (WireError, DeadlineExceeded, StoreError) as error:
                if silent_ns is None:
                    _log.info("%s does not answer: %s", member.store_id, error)
            except Exception:
                _log.exception("following %s failed", member.store_id)
            if self._is_current(member):
                self.core.lost(member.store_id)
            if silent_ns is None:
                silent_ns = self._clock()
            elif self._clock() - silent_ns >= DEAD_NS:
                await self._expel(member)
                silent_ns = None
            await asyncio.sleep(RETRY_S)

    async def _ask_deltas(
        self, connection: Connection, member: Member, answered: Callable[[], None]
    ) -> None:
        host = self.core.host(member.store_id)
        after = EVERYTHING if host is None else host.sequence
        frame = await self._call(
            connection,
            AskDeltas(self.epoch, member.epoch, after),
            INVENTORY_S if after == EVERYTHING else ANSWER_S,
        )
        answered()
        deltas = _expected(frame, Deltas)
        if deltas.is_whole and self._is_current(member):
            self.core.hold(member.store_id, deltas, frame.body)
        async with self._building:
            if not self._is_current(member):
                return
            if not deltas.is_whole:
                self.core.take(member.store_id, deltas, frame.body)
            elif self.core.is_held(member.store_id):  # or it went along with another one
                await self._build()
        self._note_whole()

    async def _build(self) -> None:
        """Of all inventories that came while the last build ran. A million keys are some 0.1 s of
        work: in a thread, so that this loop renews its lease and answers meanwhile."""
        build, made = self.core.begin(), None
        try:
            made = await asyncio.to_thread(build.run)
        finally:
            self.core.finish(made)

    async def _expel(self, member: Member) -> None:
        try:
            done = await asyncio.to_thread(
                self._metadata.expel, member.store_id, member.epoch, master_epoch=self.epoch
            )
        except StoreError as error:
            _log.warning("%s answers no more, but stays in the table: %s", member.store_id, error)
            return
        if done:
            _log.warning("%s answers no more, and is a member no more", member.store_id)
            self.core.counters["removed"] += 1

    def _is_current(self, member: Member) -> bool:
        host = self.core.host(member.store_id)
        return host is not None and host.member == member

    def _note_whole(self) -> None:
        if self._whole_ns is None and self.core.is_whole:
            self._whole_ns = self._clock()

    # ── copies ───────────────────────────────────────────────────────────────────────────────────

    async def _replicate(self) -> None:
        while True:
            await asyncio.sleep(COPIES_LOOK_S)
            copy = self._replication.next_copy(self.core.holders, self.core.hosts, self._clock())
            if copy is not None:
                copied = await self._copy(copy, time.monotonic() + COPY_S)
                blocks = 0 if copied is None else copied.blocks
                self.core.counters["replicas"] += blocks
                self._replication.done(copy, blocks, self._clock())

    async def _copy(self, copy: Copy, until_s: float) -> Copied | None:
        """None where it did not come to anything."""
        target = copy.target.member
        connection = self._connections.get(target.store_id)
        deadline_s = min(_left(until_s), COPY_S)
        if connection is None or deadline_s <= 0:
            return None
        message = CopyChain(
            self.epoch,
            target.epoch,
            b"".join(copy.keys),
            copy.source.member.address,
            max(1, int(deadline_s * S / MS)),
            pack_ages(copy.remembered),
            copy.tenant,
        )
        try:
            frame = await self._call(connection, message, deadline_s + ANSWER_S)
            copied = _expected(frame, Copied)
        except PdserveError as error:
            _log.info("nothing was copied to %s: %s", target.store_id, error)
            return None
        async with self._building:
            if self._is_current(target):
                self.core.copied(target.store_id, copy.keys[: copied.present], copied.blocks)
        return copied

    async def _chains(self, source: Host) -> Chains:
        member = source.member
        connection = self._connections.get(member.store_id)
        if connection is None:
            raise StoreError(f"{member.store_id} does not answer just now")
        frame = await self._call(connection, AskParents(self.epoch, member.epoch), INVENTORY_S)
        parents = _expected(frame, Parents)
        return Chains.of(children_in(bytes(frame.body)), parents.tenants)

    # ── connections ──────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def _connected(self, member: Member) -> Any:
        connection = await connect(
            member.address,
            host=self._host,
            codec=protocol.PROTOCOL,
            timeout_s=ANSWER_S,
            ssl_context=self._credentials.ssl_context(server_side=False),
        )
        try:
            greeting = protocol.Greet(self._master, token=self._credentials.worker_token())
            await connection.call(greeting, timeout_s=ANSWER_S)
            self._connections[member.store_id] = connection
            yield connection
        finally:
            if self._connections.get(member.store_id) is connection:
                del self._connections[member.store_id]
            connection.abort()

    async def _call(self, connection: Connection, message: object, timeout_s: float) -> Frame:
        """The node's answer. Raises StaleEpoch where it refuses one of the epochs."""
        frame = await connection.call(message, timeout_s=timeout_s)
        if isinstance(frame.message, RefusedByNode):
            if frame.message.master_epoch > self.epoch:
                self._later_epoch = frame.message.master_epoch
                self._replaced.set()
            raise StaleEpoch(f"a node of epoch {frame.message.epoch} refuses epoch {self.epoch}")
        return frame


def _expected(frame: Frame, expected: type[T]) -> T:
    message: Any = frame.message
    if not isinstance(message, expected):
        raise StoreError(f"a node answered {type(message).__name__}")
    return message


def _left(until_s: float) -> float:
    return until_s - time.monotonic()
