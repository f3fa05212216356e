"""Soft pins that requests ask for: once a prompt's blocks are stored, the stores are told.

A client says ``prompt_cache_retention: "30m"`` (OpenAI's field, whose values are ``in_memory`` and
``24h``). It gets a soft pin, never a hard one: those take memory from all others, and are an
operator's (``pdserve kv warm --pin hard``). A request never waits for its pin.

A worker answers before it stores where a request ends with its first token, so blocks may be on
their way when they are to be pinned: they are looked for again, a few times.
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

AT_ONCE = 8
"""Prompts that are looked for at the same time."""

PAUSES_S = (0.05, 0.2, 0.8, 2.0)
"""Between two looks for blocks that are not there yet."""

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
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            keys, lifetime_ms = await self._waiting.get()
            try:
                await self._pin_whole(keys, lifetime_ms)
            except PdserveError as error:
                log.warning("a prompt is not pinned: %s", error)
            finally:
                self._waiting.task_done()

    async def _pin_whole(self, keys: Sequence[BlockKey], lifetime_ms: int) -> None:
        """At all stores, until one has all of it, or nothing more is to be expected."""
        for pause_s in (*PAUSES_S, None):
            addresses = addresses_in(await self._snapshot())
            counts = await asyncio.gather(
                *(self._pin(each, keys, lifetime_ms) for each in addresses)
            )
            if pause_s is None or max(counts, default=0) == len(keys):
                return
            await asyncio.sleep(pause_s)

    async def _pin(self, store: Address, keys: Sequence[BlockKey], lifetime_ms: int) -> int:
        try:
            return await asyncio.to_thread(_pin, store, keys, lifetime_ms, self._credentials)
        except PdserveError as error:
            log.warning("a prompt is not pinned everywhere: %s", error)
            return 0


def _pin(
    address: Address,
    keys: Sequence[BlockKey],
    lifetime_ms: int,
    credentials: Credentials | None,
) -> int:
    admin = StoreAdmin(address, host=local_host_id(), timeout_s=ANSWER_S, credentials=credentials)
    try:
        return admin.pin(keys, hard=False, lifetime_ms=lifetime_ms)
    finally:
        admin.close()
