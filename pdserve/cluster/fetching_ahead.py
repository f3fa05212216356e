"""Tells a host's store which prompts are on their way, while they wait in the router.

What of their prefix lies on the disk comes up meanwhile, so that the claim, when the prefill
begins, finds it in memory. Only a hint: one that comes too late or not at all costs time.
"""

import asyncio
import logging

from pdserve.errors import PdserveError
from pdserve.ids import HostId
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.messages import Address, FetchAhead

log = logging.getLogger(__name__)

WAITING_MAX = 64
"""Hints that wait for the store's answer; more are dropped."""


class FetchingAhead:
    def __init__(self, store: Address, host: HostId) -> None:
        self._store = store
        self._host = host
        self._waiting: asyncio.Queue[FetchAhead] = asyncio.Queue(WAITING_MAX)

    def take(self, message: FetchAhead) -> None:
        if not self._waiting.full():
            self._waiting.put_nowait(message)

    async def run(self) -> None:
        """Until cancelled, or the store is gone; whoever watches it says so."""
        try:
            admin = await asyncio.to_thread(StoreAdmin, self._store, host=self._host)
        except PdserveError as error:
            log.warning("prefixes are not fetched ahead: %s", error)
            return
        try:
            while True:
                message = await self._waiting.get()
                await asyncio.to_thread(admin.prefetch, message.block_keys, tenant=message.tenant)
        except PdserveError as error:
            log.warning("prefixes are fetched ahead no more: %s", error)
        finally:
            admin.close()
