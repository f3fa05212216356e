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
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from pdserve.errors import ConfigError, PdserveError, StoreUnavailable
from pdserve.ids import StoreId, new_store_id
from pdserve.kvstore.arena import Arena, Geometry, allocate, create_arena, geometry_of
from pdserve.kvstore.codecs import PayloadCodec, codec_of
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.directory import ARENA_NAME, take_directory
from pdserve.kvstore.eviction import EvictionName
from pdserve.kvstore.lending import Lending
from pdserve.kvstore.master import Master
from pdserve.kvstore.metadata import EmbeddedMetadata, Member, Metadata, RedisMetadata
from pdserve.kvstore.mooncake import engine_at
from pdserve.kvstore.one_sided import OneSidedNode
from pdserve.kvstore.protocol import PROTOCOL, Welcome
from pdserve.kvstore.readers import Readers
from pdserve.kvstore.security import CREDENTIALS, Credentials
from pdserve.kvstore.server import StoreServer
from pdserve.kvstore.ssd_log import open_log
from pdserve.kvstore.ssd_tier import SsdTier, WritePolicy
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
    ssd_write: WritePolicy = "second_touch"
    codec: PayloadCodec = PayloadCodec.UNSTATED
    tcp_host: str | None = None  # None: no other host can reach this node
    redis_url: str | None = None
    # For other hosts; without any, TCP trusts its network.
    credentials: Credentials = dataclasses.field(default_factory=Credentials)
    mooncake: bool = False  # also serve one-sided reads, at ``tcp_host``
    metadata: Path | None = None  # a file; neither this nor Redis: the node is nowhere registered


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
        arena = create_arena(path, geometry, settings.store_id, codec=settings.codec)
        welcome = Welcome(
            settings.store_id,
            settings.block_bytes,
            str(path),
            codec=settings.codec,
            has_disk=settings.ssd_directory is not None,
        )
        lending = Lending(path, geometry.slot_count)
        ending.callback(lending.close)
        core, ssd = await _core(settings, geometry, arena, lending, ending)
        one_sided = None
        if settings.mooncake:
            one_sided = OneSidedNode(engine_at(_reachable_host(settings)), arena)
            welcome = one_sided.welcome(welcome)
        server = StoreServer(
            core,
            arena,
            welcome,
            lending,
            ssd=ssd,
            cluster_key=cluster_key,
            one_sided=one_sided,
        )
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
            master = Master(metadata)
            member = master.join(settings.store_id, listener.address, dead=directory.dead)
            ending.callback(_leave, master, member)
        warming = asyncio.create_task(_take_memory(path, stopped))
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
    arena: Arena,
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
    ssd = SsdTier(core, arena, log, policy=settings.ssd_write)
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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = _parse(arguments)
    try:
        asyncio.run(_run_until_told(settings))
    except PdserveError as error:
        print(f"store node: {error}", file=sys.stderr)
        return 2
    return 0


async def _run_until_told(settings: NodeSettings) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stopped.set)

    def wait_for_end_of_input() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before the input
            loop.call_soon_threadsafe(stopped.set)

    threading.Thread(target=wait_for_end_of_input, name="input", daemon=True).start()
    await run_node(settings, stopped, lambda line: print(line, flush=True))


async def _take_memory(path: Path, stopped: asyncio.Event) -> None:
    """Take the arena's memory, piece by piece, beside serving, and have it touched."""
    size = path.stat().st_size
    offset = 0
    try:
        while offset < size and not stopped.is_set():
            offset = await asyncio.to_thread(allocate, path, offset)
    except OSError as error:
        stopped.set()
        raise ConfigError(
            f"no memory for the arena beyond {offset} of {size} bytes: {error.strerror}; lower "
            "store.arena_bytes"
        ) from error
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


async def _finish(task: asyncio.Task[None]) -> None:
    await task


def _metadata(settings: NodeSettings) -> Metadata | None:
    if settings.redis_url is not None:
        return RedisMetadata(settings.redis_url)
    if settings.metadata is not None:
        return EmbeddedMetadata(settings.metadata)
    return None


def _leave(master: Master, member: Member) -> None:
    try:
        master.leave(member)
    except StoreUnavailable as error:
        _log.warning("%s could not leave: %s", member.store_id, error)


def _parse(arguments: list[str] | None) -> NodeSettings:
    parser = argparse.ArgumentParser(prog="python -m pdserve.kvstore.node", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="for the socket")
    parser.add_argument("--arena-bytes", type=int, required=True)
    parser.add_argument("--block-bytes", type=int, required=True)
    parser.add_argument("--store-id", type=StoreId, default=None)
    parser.add_argument("--shared", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--eviction", choices=get_args(EvictionName), default="turns")
    parser.add_argument("--shares", type=json.loads, default={}, help="JSON: weights of tenants")
    parser.add_argument("--hard-pin-ratio", type=float, default=0.25, help="of the arena")
    parser.add_argument("--ssd-directory", type=Path, default=None, help="for blocks on a disk")
    parser.add_argument("--ssd-bytes", type=int, default=0)
    parser.add_argument("--ssd-write", choices=get_args(WritePolicy), default="second_touch")
    parser.add_argument("--codec", type=codec_of, default=PayloadCodec.UNSTATED)
    parser.add_argument("--tcp-host", default=None, help="an address that other hosts can reach")
    parser.add_argument("--redis-url", default=None)
    parser.add_argument("--metadata", type=Path, default=None, help="a file, instead of Redis")
    parser.add_argument("--mooncake", action="store_true", help="one-sided reads at --tcp-host")
    for name in CREDENTIALS:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=Path, default=None, help="for peers over TCP")
    given = vars(parser.parse_args(arguments))
    credentials = Credentials(**{name: given.pop(name) for name in CREDENTIALS})
    given["store_id"] = given["store_id"] or new_store_id()
    return NodeSettings(**given, credentials=credentials)


if __name__ == "__main__":
    sys.exit(main())
