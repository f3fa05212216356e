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
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pdserve.errors import ConfigError, PdserveError, StoreUnavailable
from pdserve.ids import StoreId, new_store_id
from pdserve.kvstore.arena import allocate, create_arena, geometry_of
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.directory import ARENA_NAME, take_directory
from pdserve.kvstore.master import Master
from pdserve.kvstore.metadata import EmbeddedMetadata, Member, Metadata, RedisMetadata
from pdserve.kvstore.protocol import PROTOCOL, Welcome
from pdserve.kvstore.server import StoreServer
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
    tcp_host: str | None = None  # None: no other host can reach this node
    redis_url: str | None = None
    metadata: Path | None = None  # a file; neither this nor Redis: the node is nowhere registered


async def run_node(
    settings: NodeSettings, stopped: asyncio.Event, say_ready: Callable[[str], None]
) -> None:
    """Serve until ``stopped``, and leave nothing behind."""
    geometry = geometry_of(settings.arena_bytes, settings.block_bytes)
    async with contextlib.AsyncExitStack() as ending:
        directory = take_directory(settings.shared, settings.store_id)
        ending.callback(directory.remove)
        path = directory.path / ARENA_NAME
        arena = create_arena(path, geometry, settings.store_id)
        welcome = Welcome(settings.store_id, settings.block_bytes, str(path))
        server = StoreServer(StoreCore(geometry.slot_count), arena, welcome)
        listener = await Listener.open(
            settings.directory,
            f"{settings.store_id}.sock",
            host=local_host_id(),
            serve=server.serve,
            codec=PROTOCOL,
            tcp_host=settings.tcp_host,
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
    parser.add_argument("--tcp-host", default=None, help="an address that other hosts can reach")
    parser.add_argument("--redis-url", default=None)
    parser.add_argument("--metadata", type=Path, default=None, help="a file, instead of Redis")
    given = vars(parser.parse_args(arguments))
    return NodeSettings(**{**given, "store_id": given["store_id"] or new_store_id()})


if __name__ == "__main__":
    sys.exit(main())
