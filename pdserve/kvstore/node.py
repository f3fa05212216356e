"""A store node: one process per host that lends its shared memory to all workers.

    python -m pdserve.kvstore.node --directory DIR --arena-bytes N --block-bytes N

prints one line of JSON when it serves, and ends when its standard input does (that is: with the
process that started it), or on SIGTERM or SIGINT. Socket, arena and its entry in the metadata go
with it; after ``kill -9`` the next node on the host removes what is left.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

from pdserve.config import SsdWrite
from pdserve.errors import ConfigError, PdserveError, StaleEpoch, StoreError, StoreUnavailable
from pdserve.ids import StoreId, new_store_id
from pdserve.kvstore.adoption import Beginning, begin
from pdserve.kvstore.arena import Geometry, geometry_of
from pdserve.kvstore.arena_memory import ArenaMemory
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.codecs import PayloadCodec, codec_of
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.directory import ARENA_NAME, SHARED, take_directory
from pdserve.kvstore.eviction import EvictionName
from pdserve.kvstore.lending import Lending
from pdserve.kvstore.masters.client import MasterMetadata
from pdserve.kvstore.masters.membership import Membership
from pdserve.kvstore.masters.metadata import EmbeddedMetadata, Member, Metadata, RedisMetadata
from pdserve.kvstore.mooncake import engine_at
from pdserve.kvstore.one_sided import OneSidedNode
from pdserve.kvstore.process import REPLACED_STATUS, run_until_told
from pdserve.kvstore.protocol import PROTOCOL, Welcome
from pdserve.kvstore.readers import Readers
from pdserve.kvstore.security import CREDENTIALS, Credentials
from pdserve.kvstore.server import StoreServer
from pdserve.kvstore.ssd.log import open_log
from pdserve.kvstore.ssd.tier import SsdTier
from pdserve.messages import Address
from pdserve.storms import log_to_stderr
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    directory: Path  # of the socket; mode 700
    arena_bytes: int
    block_bytes: int
    store_id: StoreId
    shared: Path  # where shared memory is mounted
    eviction: EvictionName = "turns"
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)  # tenants' weights
    hard_pin_ratio: float = 0.25
    ssd_directory: Path | None = None  # None: there is no disk below the arena
    ssd_bytes: int = 0
    ssd_write: SsdWrite = "second_touch"
    codec: PayloadCodec = PayloadCodec.UNSTATED
    tcp_host: str | None = None  # None: no other host can reach this node
    redis_url: str | None = None
    # For other hosts; without any, TCP trusts its network.
    credentials: Credentials = dataclasses.field(default_factory=Credentials)
    mooncake: bool = False  # also serve one-sided reads, at ``tcp_host``
    metadata: Path | None = None  # a file; none of the three: the node is nowhere registered
    masters: tuple[str, ...] = ()  # host:port; where there is neither, they have the metadata


MEMBERSHIP_CHECK_S = 1.0
"""Between two looks whether this node still is a member."""


async def run_node(
    settings: NodeSettings, stopped: asyncio.Event, say_ready: Callable[[str], None]
) -> None:
    """Serve until ``stopped``, and leave nothing behind."""
    geometry = geometry_of(settings.arena_bytes, settings.block_bytes)
    cluster_key = settings.credentials.cluster_key()
    ssl_context = settings.credentials.ssl_context(server_side=True)
    async with contextlib.AsyncExitStack() as ending:
        directory = take_directory(settings.shared, settings.store_id)
        ending.callback(directory.remove)
        path = directory.path / ARENA_NAME
        begun = begin(path, geometry, settings.store_id, codec=settings.codec)
        arena = begun.arena
        # A start that fails, because Redis is away, is no reason to lose what was taken over.
        directory.keeps = begun.inheritance is not None
        welcome = Welcome(
            settings.store_id,
            settings.block_bytes,
            str(path),
            codec=settings.codec,
            has_disk=settings.ssd_directory is not None,
        )
        lending = Lending(
            path, geometry.slot_count, epoch=arena.epoch, predecessors=begun.predecessors
        )
        ending.callback(lending.close)
        core, ssd = await _core(settings, geometry, begun, lending, ending)
        one_sided = None
        if settings.mooncake:
            one_sided = OneSidedNode(engine_at(_reachable_host(settings)), arena)
            welcome = one_sided.welcome(welcome)
        memory = ArenaMemory(path, geometry)
        server = StoreServer(
            core,
            arena,
            welcome,
            lending,
            memory=memory,
            ssd=ssd,
            cluster_key=cluster_key,
            one_sided=one_sided,
            connect=functools.partial(_connect, settings),
        )
        _go_on(begun, server)
        listener = await Listener.open(
            settings.directory,
            f"{settings.store_id}.sock",
            host=local_host_id(),
            serve=server.serve,
            codec=PROTOCOL,
            tcp_host=settings.tcp_host,
            ssl_context=ssl_context,
        )
        ending.push_async_callback(listener.close)
        directory.note_socket(listener.address.unix_path)
        metadata = _metadata(settings)
        if metadata is not None:
            server.follow(settings.masters)
            kept = _Kept(Membership(metadata), server, stopped)
            join = functools.partial(kept.join, settings.store_id, listener.address, directory.dead)
            try:
                await kept.begin(join, can_wait=bool(settings.masters))
            except StaleEpoch:
                directory.keeps = False  # nobody starts it again under this name
                raise
            ending.callback(kept.leave)
            keeping = asyncio.create_task(kept.run(join))
            ending.push_async_callback(_cancel, keeping)
        directory.keeps = False
        warming = asyncio.create_task(_take_memory(path, memory, stopped))
        ending.push_async_callback(_finish, warming)
        say_ready(
            json.dumps(
                {
                    "store_id": settings.store_id,
                    "pid": os.getpid(),
                    "address": dataclasses.asdict(listener.address),
                }
            )
        )
        await stopped.wait()
        if metadata is not None:
            kept.raise_if_replaced()


class _Kept:
    """This node's entry in the metadata, looked after."""

    def __init__(self, membership: Membership, server: StoreServer, stopped: asyncio.Event) -> None:
        self._membership = membership
        self._server = server
        self._stopped = stopped
        self._member: Member | None = None
        self._replaced: StaleEpoch | None = None

    def join(self, store_id: StoreId, address: Address, dead: Sequence[StoreId]) -> None:
        self._member = self._membership.join(store_id, address, dead=dead)
        self._server.joined(self._member.epoch)

    async def begin(self, join: Callable[[], None], *, can_wait: bool) -> None:
        """``can_wait``: for a table that is not to be had yet, while the node serves."""
        try:
            await asyncio.to_thread(join)
        except StoreUnavailable as error:
            if not can_wait:
                raise
            _log.warning("no master answers yet, serving without one: %s", error)

    async def run(self, join: Callable[[], None]) -> None:
        """Until cancelled, or a successor has this node's place: then the node is to end. ``join``
        is for one that has not joined yet."""
        while True:
            await asyncio.sleep(MEMBERSHIP_CHECK_S)
            try:
                if self._member is None:
                    await asyncio.to_thread(join)
                else:
                    await self._keep(self._member)
            except StaleEpoch as error:
                self._replaced = error
                self._stopped.set()
                return
            except StoreError as error:  # without the table everything goes on as it is
                _log.debug("the metadata is not to be had: %s", error)

    async def _keep(self, member: Member) -> None:
        after = await asyncio.to_thread(self._membership.keep, member)
        if after != member:
            _log.warning(
                "%s was taken for dead, and has joined again under epoch %d",
                after.store_id,
                after.epoch,
            )
            self._member = after
            self._server.joined(after.epoch)

    def leave(self) -> None:
        if self._member is None:
            return
        try:
            self._membership.leave(self._member)
        except StoreUnavailable as error:
            _log.warning("%s could not leave: %s", self._member.store_id, error)

    def raise_if_replaced(self) -> None:
        if self._replaced is not None:
            raise self._replaced


def _go_on(begun: Beginning, server: StoreServer) -> None:
    if begun.inheritance is None:
        return
    server.settle()  # clients find the index as it will be
    if begun.inheritance.held:
        loop = asyncio.get_running_loop()
        begun.predecessors.when_gone(functools.partial(_tell, loop, server.predecessors_gone))


def _connect(settings: NodeSettings, address: Address, timeout_s: float) -> StoreClient:
    """To another node, for a copy. Without shared memory: this process lends its own."""
    return StoreClient(
        address,
        host=local_host_id(),
        owner=f"copy-{settings.store_id}",
        shared_memory=False,
        codec=settings.codec,
        ssl_context=settings.credentials.ssl_context(server_side=False),
        token=settings.credentials.worker_token(),
        connect_timeout_s=timeout_s,
    )


def _reachable_host(settings: NodeSettings) -> str:
    if settings.tcp_host is None:
        raise ConfigError("--mooncake serves other hosts; give --tcp-host as well")
    if settings.credentials != Credentials():
        raise ConfigError(
            "--mooncake has neither certificates nor tokens: whoever reaches its port may do all; "
            "leave it out, or leave out TLS and the key file"
        )
    return settings.tcp_host


async def _core(
    settings: NodeSettings,
    geometry: Geometry,
    begun: Beginning,
    readers: Readers,
    ending: contextlib.AsyncExitStack,
) -> tuple[StoreCore, SsdTier | None]:
    core_of = functools.partial(
        StoreCore,
        geometry.slot_count,
        eviction=settings.eviction,
        shares=settings.shares,
        hard_pins_max=int(geometry.slot_count * settings.hard_pin_ratio),
        readers=readers,
        inheritance=begun.inheritance,
    )
    if settings.ssd_directory is None:
        return core_of(), None
    log = await asyncio.to_thread(
        open_log,
        settings.ssd_directory,
        settings.block_bytes,
        settings.ssd_bytes,
        codec=settings.codec,
    )
    core = core_of(lower=log)
    ssd = SsdTier(core, begun.arena, log, policy=settings.ssd_write)
    ending.callback(ssd.close)
    writing = asyncio.create_task(ssd.run())
    ending.push_async_callback(_cancel, writing)
    ending.push_async_callback(ssd.finish)
    return core, ssd


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def main(arguments: list[str] | None = None) -> int:
    """0 after an orderly end, 2 when it cannot start or has no memory."""
    log_to_stderr()
    settings = _parse(arguments)
    try:
        asyncio.run(run_until_told(functools.partial(run_node, settings)))
    except PdserveError as error:
        print(f"store node: {error}", file=sys.stderr)
        return REPLACED_STATUS if isinstance(error, StaleEpoch) else 2
    return 0


async def _take_memory(path: Path, memory: ArenaMemory, stopped: asyncio.Event) -> None:
    """Take the arena's memory, piece by piece, beside serving, and have it touched."""
    try:
        while not (memory.is_whole or stopped.is_set()):
            await asyncio.to_thread(memory.take_piece)
    except ConfigError:
        stopped.set()
        raise
    if not stopped.is_set():
        await _warm(path, stopped)


async def _warm(path: Path, stopped: asyncio.Event) -> None:
    command = (sys.executable, "-m", "pdserve.kvstore.warming", str(path))
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    ends = asyncio.ensure_future(stopped.wait())
    done = asyncio.ensure_future(process.wait())
    await asyncio.wait((ends, done), return_when=asyncio.FIRST_COMPLETED)
    ends.cancel()
    if process.returncode is None:
        process.kill()
    if await done and not stopped.is_set():
        _log.warning("the arena could not be warmed, first writes are slower")


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    """From another thread; a loop that has ended needs to know nothing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(what)


async def _finish(task: asyncio.Task[None]) -> None:
    await task


def _metadata(settings: NodeSettings) -> Metadata | None:
    if settings.redis_url is not None:
        return RedisMetadata(settings.redis_url)
    if settings.metadata is not None:
        return EmbeddedMetadata(settings.metadata)
    if settings.masters:
        return MasterMetadata(settings.masters, settings.credentials, name=settings.store_id)
    return None


def _parse(arguments: list[str] | None) -> NodeSettings:
    parser = argparse.ArgumentParser(prog="python -m pdserve.kvstore.node", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="for the socket")
    parser.add_argument("--arena-bytes", type=int, required=True)
    parser.add_argument("--block-bytes", type=int, required=True)
    parser.add_argument("--store-id", type=StoreId, default=None)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--eviction", choices=get_args(EvictionName), default="turns")
    parser.add_argument("--shares", type=json.loads, default={}, help="JSON: weights of tenants")
    parser.add_argument("--hard-pin-ratio", type=float, default=0.25, help="of the arena")
    parser.add_argument("--ssd-directory", type=Path, default=None, help="for blocks on a disk")
    parser.add_argument("--ssd-bytes", type=int, default=0)
    parser.add_argument("--ssd-write", choices=get_args(SsdWrite), default="second_touch")
    parser.add_argument("--codec", type=codec_of, default=PayloadCodec.UNSTATED)
    parser.add_argument("--tcp-host", default=None, help="an address that other hosts can reach")
    parser.add_argument("--redis-url", default=None)
    parser.add_argument("--metadata", type=Path, default=None, help="a file, instead of Redis")
    parser.add_argument("--masters", nargs="*", default=(), help="host:port of each")
    parser.add_argument("--mooncake", action="store_true", help="one-sided reads at --tcp-host")
    for name in CREDENTIALS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=Path, default=None, help="for peers over TCP")
    given = vars(parser.parse_args(arguments))
    credentials = Credentials(**{name: given.pop(name) for name in CREDENTIALS})
    given["store_id"] = given["store_id"] or new_store_id()
    given["masters"] = tuple(given["masters"])
    return NodeSettings(**given, credentials=credentials)


if __name__ == "__main__":
    sys.exit(main())
