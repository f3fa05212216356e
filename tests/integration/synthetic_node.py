"""A member of a store that has an inventory of random keys and no arena: what a master sees of one.

In the test's own event loop; ``bench.kvstore_master`` has such nodes as processes.
"""

import os
from pathlib import Path

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, StoreId
from pdserve.kvstore import protocol
from pdserve.kvstore.masters.mastering import AskDeltas, Deltas
from pdserve.kvstore.masters.membership import Membership
from pdserve.kvstore.masters.metadata import Metadata
from pdserve.wire.connection import Connection
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener


class SyntheticNode:
    """Nothing changes there, and everything fits its first answer."""

    def __init__(self, store_id: str, blocks: int) -> None:
        self.store_id = StoreId(store_id)
        self._blocks = blocks
        self._inventory = os.urandom(blocks * BLOCK_KEY_BYTES)
        self._epoch = 0
        self._listener: Listener | None = None

    @property
    def keys(self) -> tuple[BlockKey, BlockKey]:
        """The first and the last one of its inventory."""
        size = BLOCK_KEY_BYTES
        return BlockKey(self._inventory[:size]), BlockKey(self._inventory[-size:])

    async def open(self, directory: Path, metadata: Metadata) -> None:
        """Serve, and become a member."""
        self._listener = await Listener.open(
            directory,
            f"{self.store_id}.sock",
            host=local_host_id(),
            serve=self._serve,
            codec=protocol.PROTOCOL,
        )
        self._epoch = Membership(metadata).join(self.store_id, self._listener.address).epoch

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()

    async def _serve(self, connection: Connection) -> None:
        while True:
            frame = await connection.receive()
            match frame.message:
                case protocol.Greet():
                    await connection.answer(frame, protocol.Welcome(self.store_id, 1, ""))
                case AskDeltas(after=after):
                    body = (self._inventory,) if after < 0 else ()
                    await connection.answer(frame, self._deltas(after), body)

    def _deltas(self, after: int) -> Deltas:
        is_whole = after < 0
        return Deltas(
            epoch=self._epoch,
            after=after,
            sequence=0,
            is_whole=is_whole,
            added=self._blocks if is_whole else 0,
            removed=0,
            slots_free=0,
            block_bytes=1,
            codec=0,
            is_draining=False,
        )
