"""Tells other gateways what tenants have spent, by way of Redis, about once a second.

Requests never wait for it. While Redis cannot be reached each gateway counts for itself, and tells
what has come together once it can. A sum whose answer was lost on its way is told twice: a tenant
is never given more than its quota for it, but may be given a second's worth less.
"""

import asyncio
import logging

from pdserve.clock import unix_ms
from pdserve.cluster.gateway.quotas import Entry, Ledger
from pdserve.errors import StoreUnavailable
from pdserve.kvstore.shared_counts import SharedCounts

log = logging.getLogger(__name__)

EVERY_S = 1.0

PART_MAX = 1_000
"""Entries of one exchange."""


async def exchange(ledger: Ledger, counts: SharedCounts) -> None:
    """Once.

    Raises:
        StoreUnavailable: Redis does not answer; nothing is lost.
    """
    now_ms = unix_ms()
    entries = ledger.entries(now_ms)
    for start in range(0, len(entries), PART_MAX):
        part = entries[start : start + PART_MAX]
        sums = await counts.add({entry.name: (entry.tokens, _kept_ms(entry)) for entry in part})
        ledger.told(part, sums)


def _kept_ms(entry: Entry) -> int:
    """Two windows: clocks of hosts differ, and nobody asks later."""
    return 2 * entry.period.value


async def exchange_for_ever(ledger: Ledger, counts: SharedCounts) -> None:
    failing = False
    while True:
        try:
            await exchange(ledger, counts)
            failing = False
        except StoreUnavailable as error:
            if not failing:
                log.warning("quotas are counted here alone for now: %s", error)
            failing = True
        await asyncio.sleep(EVERY_S)
