"""A master of the store: leads, or stands by until nobody else does.

    python -m pdserve.kvstore.masters.process --directory DIR (--metadata FILE | --redis-url URL)

prints one line of JSON when it can be asked, and ends when its standard input does, or on SIGTERM
or SIGINT. Two of them over one metadata are a master and its standby; what each of them knows of
blocks dies with it and is asked for again by the other. No worker, and no store node, needs either
of them to go on.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from pdserve.clock import S, monotonic
from pdserve.errors import (
    AccessDenied,
    ConfigError,
    Disconnected,
    ErrorInfo,
    FrameError,
    PdserveError,
    StoreError,
)
from pdserve.kvstore import protocol
from pdserve.kvstore.capability import Capability, Gate, Operation, own_keys
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.masters.election import BEAT_NS, Election, Renew, Take
from pdserve.kvstore.masters.leading import Leader, Replaced
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Metadata, RedisMetadata, Seat
from pdserve.kvstore.masters.protocol import (
    MASTER_PROTOCOL,
    AskMaster,
    AskMembers,
    Epoch,
    Locate,
    MasterReport,
    Members,
    NextEpoch,
    NotLeading,
    Register,
    Remove,
    Vacate,
)
from pdserve.kvstore.process import run_until_told
from pdserve.kvstore.security import CREDENTIALS, Credentials
from pdserve.messages import Address
from pdserve.storms import log_to_stderr
from pdserve.wire.connection import Connection, Frame, connect
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener

WATCH_S = 0.1
"""Between two attempts to hold a connection to whoever leads."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MasterSettings:
    directory: Path  # of the socket; mode 700
    master: str
    socket: str | None = None  # its name in there; None: the master's
    tcp_host: str | None = None
    tcp_port: int = 0
    redis_url: str | None = None
    metadata: Path | None = None
    credentials: Credentials = dataclasses.field(default_factory=Credentials)


class MasterService:
    """Its part in the election, and the answers to whoever asks."""

    def __init__(self, settings: MasterSettings, metadata: Metadata) -> None:
        self._settings = settings
        self._metadata = metadata
        self._gate = Gate(settings.credentials.cluster_key(), monotonic)
        self._host = local_host_id()
        self._seat: Seat | None = None
        self._leader: Leader | None = None
        self._election: Election | None = None
        self._looked = asyncio.Event()  # the seat is to be looked at now

    # ── the election ─────────────────────────────────────────────────────────────────────────────

    async def run(self, address: Address) -> None:
        """Until cancelled."""
        election = self._election = Election(self._settings.master, address)
        term: asyncio.Task[None] | None = None
        watch = asyncio.create_task(self._watch(election))
        try:
            while True:
                with contextlib.suppress(StoreError):  # the table is away: all stays as it is
                    await asyncio.to_thread(self._look, election)
                term = await self._follow(election, term)
                waits = [asyncio.ensure_future(self._looked.wait())]
                done = [term, *waits] if term is not None else waits
                await asyncio.wait(done, timeout=BEAT_NS / S, return_when=asyncio.FIRST_COMPLETED)
                waits[0].cancel()
                self._looked.clear()
        finally:
            for task in (watch, term):
                if task is not None:
                    task.cancel()
                    await asyncio.wait((task,))
            with contextlib.suppress(StoreError):
                leaving = election.leaving()
                if leaving is not None:
                    await asyncio.to_thread(self._metadata.change_seat, leaving.seen, leaving.after)

    def _look(self, election: Election) -> None:
        """In a thread: the table may hang."""
        seat = self._metadata.seat()
        self._seat = seat
        match election.look(seat, monotonic()):
            case Renew(seen, after):
                taken = after
            case Take(seen, above) as bid:
                taken = election.seat_of(bid, self._metadata.next_epoch(above=above))
            case None:
                return
        if self._metadata.change_seat(seen, taken):
            election.won(taken)
            self._seat = taken
        else:
            election.refused()

    async def _follow(
        self, election: Election, term: asyncio.Task[None] | None
    ) -> asyncio.Task[None] | None:
        """Begin or end a term of office, as the election has it."""
        if term is not None and term.done():
            with contextlib.suppress(asyncio.CancelledError):
                for error in _leaves(term.exception()):
                    if isinstance(error, Replaced):
                        election.fenced(error.epoch)
                    else:
                        _log.error("a term of office failed", exc_info=error)
            term, self._leader = None, None
        epoch = election.epoch
        if self._leader is not None and self._leader.epoch != epoch:
            assert term is not None
            _log.warning("%s leads no more", self._settings.master)
            term.cancel()
            await asyncio.wait((term,))
            term, self._leader = None, None
        if self._leader is None and epoch is not None:
            _log.warning("%s leads under epoch %d", self._settings.master, epoch)
            self._leader = Leader(
                self._settings.master,
                epoch,
                self._metadata,
                host=self._host,
                credentials=self._settings.credentials,
            )
            term = asyncio.create_task(self._leader.run())
        return term

    async def _watch(self, election: Election) -> None:
        """Hold a connection to who leads: its end is noticed at once where its process died, and
        makes this one bid before the lease is over. A hint: the table decides."""
        while True:
            seat = election.leader
            if election.epoch is None and seat is not None and not seat.is_vacant:
                with contextlib.suppress(PdserveError):
                    await self._hold(election, seat)
            await asyncio.sleep(WATCH_S)

    async def _hold(self, election: Election, seat: Seat) -> None:
        connection = await connect(
            seat.address,
            host=self._host,
            codec=MASTER_PROTOCOL,
            timeout_s=BEAT_NS / S,
            ssl_context=self._settings.credentials.ssl_context(server_side=False),
        )
        try:
            token = self._settings.credentials.worker_token()
            await connection.call(protocol.Greet(self._settings.master, token=token), timeout_s=1.0)
            with contextlib.suppress(Disconnected):
                await connection.receive()
            election.suspect(seat.epoch)
            self._looked.set()
        finally:
            connection.abort()

    # ── those who ask ────────────────────────────────────────────────────────────────────────────

    async def serve(self, connection: Connection) -> None:
        connection.limit_bodies(0)  # nobody has any
        frame = await connection.receive()
        if not isinstance(frame.message, protocol.Greet) or frame.call == 0:
            raise FrameError(f"{type(frame.message).__name__} before Greet")
        try:
            capability = self._gate.open(connection.peer, frame.message)
        except AccessDenied as error:
            await connection.answer(frame, ErrorInfo.of(error))
            return
        await connection.answer(frame, protocol.Done())
        while True:
            frame = await connection.receive()
            if frame.call == 0:
                raise FrameError(f"{type(frame.message).__name__} without a number")
            try:
                answer = await self._answer(capability, frame)
            except PdserveError as error:
                answer = ErrorInfo.of(error)
            await connection.answer(frame, answer)

    async def _answer(self, capability: Capability, frame: Frame) -> object:  # noqa: PLR0911
        message = frame.message
        if isinstance(message, Locate):
            return self._locate(capability, message)
        if Operation.ADMIN not in capability.operations or capability.key_prefix:
            raise AccessDenied(
                f"{type(message).__name__} needs a token for admin, and of no one tenant"
            )
        match message:
            case AskMaster():
                return self._report()
            case Vacate():
                return (
                    self._not_leading()
                    if self._leader is None
                    else (await self._leader.vacate(message))
                )
            case AskMembers():
                return Members(await asyncio.to_thread(self._metadata.members))
            case NextEpoch(above):
                next_epoch = functools.partial(self._metadata.next_epoch, above=above)
                return Epoch(await asyncio.to_thread(next_epoch))
            case Register(member):
                await asyncio.to_thread(self._metadata.register, member)
                return protocol.Done()
            case Remove(store_id, epoch):
                await asyncio.to_thread(self._metadata.remove, store_id, epoch)
                return protocol.Done()
            case _:
                raise FrameError(f"{type(message).__name__} is not for a master")

    def _locate(self, capability: Capability, message: Locate) -> object:
        if Operation.READ not in capability.operations:
            raise AccessDenied("Locate needs a token for read")
        if self._leader is None:
            return self._not_leading()
        if capability.key_prefix:
            own = own_keys(capability.key_prefix, split_keys(message.keys))
            message = dataclasses.replace(message, keys=b"".join(own))
        return self._leader.locate(message)

    def _not_leading(self) -> NotLeading:
        is_led = self._seat is not None and not self._seat.is_vacant
        if not is_led or self._seat is None or self._seat.master == self._settings.master:
            return NotLeading(None)
        return NotLeading(self._seat.address)

    def _report(self) -> MasterReport:
        if self._leader is not None:
            return self._leader.report(self._seat)
        return MasterReport(self._settings.master, 0, self._seat)


def _leaves(error: BaseException | None) -> list[BaseException]:
    """The errors in a group of them."""
    if error is None:
        return []
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


async def run_master(
    settings: MasterSettings, stopped: asyncio.Event, say_ready: Callable[[str], None]
) -> None:
    """Serve until ``stopped``."""
    settings.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # the file may lie there
    metadata = await asyncio.to_thread(_metadata, settings)
    service = MasterService(settings, metadata)
    listener = await Listener.open(
        settings.directory,
        settings.socket or f"{settings.master}.sock",
        host=local_host_id(),
        serve=service.serve,
        codec=MASTER_PROTOCOL,
        tcp_host=settings.tcp_host,
        tcp_port=settings.tcp_port,
        ssl_context=settings.credentials.ssl_context(server_side=True),
    )
    running = asyncio.create_task(service.run(listener.address))
    try:
        ready = {
            "master": settings.master,
            "pid": os.getpid(),
            "address": dataclasses.asdict(listener.address),
        }
        say_ready(json.dumps(ready))
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
    finally:
        running.cancel()
        await asyncio.wait((running,))
        await listener.close()
    if not running.cancelled() and (error := running.exception()) is not None:
        raise error


def _metadata(settings: MasterSettings) -> Metadata:
    if settings.redis_url is not None:
        return RedisMetadata(settings.redis_url)
    if settings.metadata is None:
        raise ConfigError("a master needs --metadata or --redis-url: what it knows of members")
    return EmbeddedMetadata(settings.metadata)


def main(arguments: list[str] | None = None) -> int:
    """0 after an orderly end, 2 when it cannot start."""
    log_to_stderr()
    settings = _parse(arguments)
    try:
        asyncio.run(run_until_told(functools.partial(run_master, settings)))
    except PdserveError as error:
        print(f"store master: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: list[str] | None) -> MasterSettings:
    parser = argparse.ArgumentParser(
        prog="python -m pdserve.kvstore.masters.process", description=__doc__
    )
    parser.add_argument("--directory", type=Path, required=True, help="for the socket")
    parser.add_argument("--master", default=f"master-{secrets.token_hex(4)}", help="its name")
    parser.add_argument("--socket", default=None, help="its name; a successor may take it over")
    parser.add_argument("--tcp-host", default=None, help="an address that other hosts can reach")
    parser.add_argument("--tcp-port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--redis-url", default=None)
    parser.add_argument("--metadata", type=Path, default=None, help="a file, instead of Redis")
    for name in CREDENTIALS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=Path, default=None, help="for peers over TCP")
    given = vars(parser.parse_args(arguments))
    credentials = Credentials(**{name: given.pop(name) for name in CREDENTIALS})
    return MasterSettings(**given, credentials=credentials)


if __name__ == "__main__":
    sys.exit(main())
