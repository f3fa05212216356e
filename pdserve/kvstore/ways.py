"""Which way a client's bytes take, decided once it was greeted."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from pdserve.errors import StoreUnavailable
from pdserve.kvstore import lending, protocol
from pdserve.kvstore.arena import map_arena, open_arena
from pdserve.kvstore.codecs import PayloadCodec
from pdserve.kvstore.hazards import ReaderBoard
from pdserve.kvstore.local_reads import LocalReads
from pdserve.kvstore.mooncake import engine_at
from pdserve.kvstore.one_sided import OneSided
from pdserve.kvstore.phases import Phases
from pdserve.kvstore.pipeline import Corrupt
from pdserve.kvstore.shared_index import map_index
from pdserve.kvstore.transfer import Call, SharedMemory, Sockets
from pdserve.wire.blocking import BlockingConnection


def open_way(
    connection: BlockingConnection,
    call: Call,
    welcome: protocol.Welcome,
    lent: Mapping[str, int] | None,
    counters: Counter[str],
    *,
    mooncake: bool,
    verify: bool,
    codec: PayloadCodec | None,
    corrupt: Corrupt | None,
    phases: Phases,
) -> SharedMemory | OneSided | Sockets:
    """``lent``: descriptors by name, of what the node lends; None: memory is not to be shared.

    Raises:
        StoreUnavailable: it lends no arena.
    """
    if lent is not None:
        if lending.ARENA not in lent:
            raise StoreUnavailable(f"the node at {connection.peer} lends its arena to nobody")
        path = Path(welcome.arena_path)
        arena = map_arena(lent[lending.ARENA], welcome.store_id, writable=False)
        return SharedMemory(
            call,
            arena,
            lambda: open_arena(path, welcome.store_id, writable=True, epoch=arena.epoch),
            counters,
            verify=verify,
            codec=codec,
            corrupt=corrupt,
            phases=phases,
        )
    if mooncake and welcome.segment:
        return OneSided(
            call,
            engine_at(connection.own_host()),
            welcome,
            counters,
            verify=verify,
            codec=codec,
            corrupt=corrupt,
        )
    return Sockets(
        call,
        connection,
        welcome.block_bytes,
        counters,
        verify=verify,
        codec=codec,
        corrupt=corrupt,
        phases=phases,
    )


def local_reads(
    welcome: protocol.Welcome, lent: Mapping[str, int], post: Callable[[object], bool]
) -> LocalReads | None:
    """None where the node has to be asked for pins."""
    if lending.PINS not in lent:
        return None
    return LocalReads(
        map_index(lent[lending.INDEX]),
        ReaderBoard(lent[lending.PINS]),
        post,
        has_lower_tier=welcome.has_disk,
    )
