"""Soft pins that requests ask for: once a prompt's blocks are stored, the stores are told.

A client says ``prompt_cache_retention: "30m"`` (OpenAI's field, whose values are ``in_memory`` and
``24h``). It gets a soft pin, never a hard one: those take memory from all others, and are an
operator's (``pdserve kv warm --pin hard``). A request never waits for its pin.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pdserve.cluster.kv_stores import addresses_in
from pdserve.errors import PdserveError
from pdserve.ids import BlockKey
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.security import Credentials
from pdserve.messages import Address
from pdserve.wire.hosts import local_host_id

log = logging.getLogger(__name__)

DIGITS_MAX = 12

UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

WAITING_MAX = 256
"""Prompts of one gateway that wait for their pin; more go without."""

ANSWER_S = 10.0
"""Of a store that is busy; nobody waits for it."""


def lifetime_ms_of(text: str) -> int | None:
    """Of a time as 90s, 30m, 24h or 7d; None: it is none."""
    count, unit = text[:-1], text[-1:]
    if not (count.isascii() and count.isdecimal() and len(count) <= DIGITS_MAX):
        return None
    if int(count) == 0 or unit not in UNITS_MS:
        return None
    return int(count) * UNITS_MS[unit]


class Pinning:
    def __init__(
        self,
        snapshot: Callable[[], Awaitable[Mapping[str, Any]]],
        credentials: Credentials | None = None,
    ) -> None:
        """``snapshot``: the router's, which has the stores. ``credentials``: for those on other
        hosts."""
        self._snapshot = snapshot
        self._credentials = credentials
        self._waiting: asyncio.Queue[tuple[tuple[BlockKey, ...], int]] = asyncio.Queue(WAITING_MAX)

    def keep(self, keys: Sequence[BlockKey], lifetime_ms: int) -> None:
        """The blocks are stored somewhere. Does not wait."""
        if self._waiting.full():
            log.warning("%d prompts wait for a pin already, one more goes without", WAITING_MAX)
        else:
            self._waiting.put_nowait((tuple(keys), lifetime_ms))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            keys, lifetime_ms = await self._waiting.get()
            try:
                addresses = list(addresses_in(await self._snapshot()))
                await asyncio.gather(
                    *(
                        asyncio.to_thread(_pin, each, keys, lifetime_ms, self._credentials)
                        for each in addresses
                    )
                )
            except PdserveError as error:
                log.warning("a prompt is not pinned everywhere: %s", error)


def _pin(
    address: Address,
    keys: Sequence[BlockKey],
    lifetime_ms: int,
    credentials: Credentials | None,
) -> None:
    admin = StoreAdmin(address, host=local_host_id(), timeout_s=ANSWER_S, credentials=credentials)
    try:
        admin.pin(keys, hard=False, lifetime_ms=lifetime_ms)
    finally:
        admin.close()
