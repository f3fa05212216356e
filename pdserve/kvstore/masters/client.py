"""What nodes, workers and operators use of the masters, of which any one will do.

A client knows where masters listen, and keeps a connection to the one that last answered. One that
stands by says who leads, and that one is asked next. Whoever has no answer within ``ANSWER_S`` goes
on without, and asks nobody for ``QUIET_NS``: with no master there are no locations and nothing else
changes.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pdserve.clock import MS, Clock, S, monotonic
from pdserve.errors import (
    ConfigError,
    DeadlineExceeded,
    PdserveError,
    StoreError,
    StoreUnavailable,
    WireError,
)
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.masters.metadata import Member, Seat
from pdserve.kvstore.masters.protocol import (
    MASTER_PROTOCOL,
    AskMaster,
    AskMembers,
    Epoch,
    Locate,
    Located,
    Location,
    MasterReport,
    Members,
    NextEpoch,
    NotLeading,
    Register,
    Remove,
    Vacate,
    Vacated,
)
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address
from pdserve.wire.blocking import BlockingConnection, connect_blocking
from pdserve.wire.hosts import local_host_id

ANSWER_S = 1.0
LOCATE_S = 0.25
"""For one question about locations, everything included: a read waits for it."""

QUIET_NS = 1 * S
HOPS_MAX = 3
"""From one that stands by to a leader that has just changed."""

T = TypeVar("T")


def address_of(master: str) -> Address:
    """Of ``host:port``, or of a socket's path on this host. Raises ConfigError."""
    if "/" in master:
        return Address(local_host_id(), master, "")
    name, _, port = master.rpartition(":")
    if not name or not port.isdecimal():
        raise ConfigError(f"--masters has {master!r}; it must be host:port, or a path")
    return Address(HostId(name), "", master)


class MasterClient:
    """Thread-safe: one question at a time."""

    def __init__(
        self,
        masters: Sequence[str | Address],
        credentials: Credentials | None = None,
        *,
        name: str,
        host: HostId | None = None,
    ) -> None:
        """``name``: who this is. ``host``: of this process; None: of this machine."""
        assert masters
        self._masters = [
            each if isinstance(each, Address) else address_of(each) for each in masters
        ]
        self._credentials = Credentials() if credentials is None else credentials
        self._name = name
        self._host = local_host_id() if host is None else host
        self._lock = threading.Lock()
        self._connection: BlockingConnection | None = None
        self._at: Address | None = None

    def locate(self, keys: Sequence[BlockKey], *, reads: int = 1) -> tuple[Location, ...]:
        """Who has how much of a chain, the most first. Raises StoreUnavailable."""
        message = Locate(b"".join(keys), reads)
        return self._ask_leader(message, Located, LOCATE_S).locations

    def vacate(self, store_id: StoreId, *, deadline_s: float) -> Vacated:
        """Have what only this node has copied to others. Waits for it.

        Raises:
            StoreUnavailable: nobody leads.
            StoreError: there is no such member.
        """
        message = Vacate(store_id, int(deadline_s * S / MS))
        return self._ask_leader(message, Vacated, deadline_s + ANSWER_S)

    def report(self) -> MasterReport:
        """Of the leader; where nobody leads, of one that stands by. Raises StoreUnavailable."""

        def ask() -> MasterReport:
            report = self._ask(AskMaster(), MasterReport, time.monotonic() + ANSWER_S)
            if not report.epoch and report.seat is not None and not report.seat.is_vacant:
                self._go_to(report.seat.address)
                report = self._ask(AskMaster(), MasterReport, time.monotonic() + ANSWER_S)
            return report

        return self._with_any(ask)

    def call(self, message: object, expected: type[T]) -> T:
        """What any master answers. Raises StoreUnavailable, and what the master raises."""
        return self._with_any(lambda: self._ask(message, expected, time.monotonic() + ANSWER_S))

    def close(self) -> None:
        with self._lock:
            self._leave()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _ask_leader(self, message: object, expected: type[T], limit_s: float) -> T:
        def ask() -> T:
            until_s = time.monotonic() + limit_s
            for _ in range(HOPS_MAX):
                answer = self._ask(message, object, until_s)
                if isinstance(answer, expected):
                    return answer
                if not isinstance(answer, NotLeading) or answer.leader is None:
                    break
                self._go_to(answer.leader)
            self._leave()
            raise StoreUnavailable("no master leads just now")

        return self._with_any(ask)

    def _with_any(self, ask: Callable[[], T]) -> T:
        """What ``ask`` gives with the first master that can be asked."""
        with self._lock:
            error: StoreError | None = None
            if self._connection is not None:
                try:
                    return ask()
                except StoreUnavailable as gone:
                    error = gone
            for master in self._masters:
                self._go_to(master)
                try:
                    return ask()
                except StoreUnavailable as gone:
                    error = gone
            assert error is not None
            raise error

    def _go_to(self, master: Address) -> None:
        if master != self._at:
            self._leave()
            self._at = master

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._at = None, None

    def _ask(self, message: object, expected: type[T], until_s: float) -> T:
        try:
            connection = self._connected(until_s)
            answer = connection.call(message, timeout_s=_left_s(until_s)).message
        except (WireError, DeadlineExceeded) as error:
            self._leave()
            raise StoreUnavailable(f"the master is gone: {error}") from error
        if not isinstance(answer, expected):
            self._leave()
            raise StoreUnavailable(f"the master answered {type(answer).__name__}")
        return answer

    def _connected(self, until_s: float) -> BlockingConnection:
        if self._connection is None:
            assert self._at is not None
            self._connection = connect_blocking(
                self._at,
                host=self._host,
                codec=MASTER_PROTOCOL,
                timeout_s=_left_s(until_s),
                ssl_context=self._credentials.ssl_context(server_side=False),
            )
            greeting = protocol.Greet(self._name, token=self._credentials.worker_token())
            self._connection.call(greeting, timeout_s=_left_s(until_s))
        return self._connection


def _left_s(until_s: float) -> float:
    """For a call that begins now; never nothing, which some calls take for no limit at all."""
    return max(0.001, until_s - time.monotonic())


class MasterMetadata:
    """``Metadata`` as the masters have it, for a node that reaches neither their file nor Redis."""

    def __init__(self, masters: Sequence[str], credentials: Credentials, *, name: str) -> None:
        self._client = MasterClient(masters, credentials, name=name)

    def next_epoch(self, *, above: int = 0) -> int:
        return self._client.call(NextEpoch(above), Epoch).epoch

    def register(self, member: Member) -> None:
        self._client.call(Register(member), protocol.Done)

    def members(self) -> tuple[Member, ...]:
        return self._client.call(AskMembers(), Members).members

    def remove(self, store_id: StoreId, epoch: int) -> None:
        self._client.call(Remove(store_id, epoch), protocol.Done)

    def expel(self, store_id: StoreId, epoch: int, *, master_epoch: int) -> bool:  # noqa: ARG002
        raise StoreError("only a master expels a member, and it reaches the table itself")

    def seat(self) -> Seat | None:
        return self._client.call(AskMaster(), MasterReport).seat

    def change_seat(self, seen: Seat | None, after: Seat) -> bool:  # noqa: ARG002
        raise StoreError("only a master takes the seat, and it reaches the table itself")


class QuietAfterFailure:
    """Keeps a question that nobody answered from being asked again at once. Pure."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._until_ns = 0

    def ask(self, question: Callable[[], T], otherwise: T) -> T:
        if self._clock() < self._until_ns:
            return otherwise
        try:
            return question()
        except PdserveError:
            self._until_ns = self._clock() + QUIET_NS
            return otherwise
