"""A prefix from whichever of several nodes has it, before one deadline.

Locations are tried in the order given. What one of them delivered, verified, stays; the next one
goes on behind it. A location that cannot be reached, breaks off or stalls is not tried again for
``DEAD_NS`` of the monotonic clock, so that the death of a host costs one request its wait, and not
every request. One that has not got the block, or has it wrong, is alive, and only this request goes
elsewhere. When nobody is left the rest is a miss, and ``Fetched.misses`` says of whom and why.

An attempt may take the time that is left divided by the locations that are left: a first one that
stalls leaves the second its share.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pdserve.clock import Clock, S, monotonic
from pdserve.errors import StoreError, StoreUnavailable
from pdserve.ids import BlockKey
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address

DEAD_NS = 1 * S
LOCATIONS_MAX = 1024
"""Dead ones that are remembered; the oldest is forgotten first, and tried again."""


class DeadLocations:
    """Which addresses are not worth trying now. Pure: time is an argument."""

    def __init__(self) -> None:
        self._until_ns: OrderedDict[Address, int] = OrderedDict()

    def note(self, location: Address, now_ns: int) -> None:
        self._until_ns[location] = now_ns + DEAD_NS
        self._until_ns.move_to_end(location)
        if len(self._until_ns) > LOCATIONS_MAX:
            self._until_ns.popitem(last=False)

    def is_dead(self, location: Address, now_ns: int) -> bool:
        return now_ns < self._until_ns.get(location, 0)


def attempt_s(remaining_s: float, locations_left: int) -> float:
    """How long the next attempt may take, with ``locations_left`` to try, it included."""
    assert locations_left > 0
    return remaining_s / locations_left


@dataclass(frozen=True, slots=True)
class Fetched:
    count: int  # blocks delivered, from the first that was asked for
    misses: tuple[tuple[Address, str], ...]  # why each location that was tried did not give all


class FailoverReader:
    """For one thread. Keeps a client per location, until it fails or ``close``."""

    def __init__(
        self, connect: Callable[[Address, float], StoreClient], *, clock: Clock = monotonic
    ) -> None:
        """``connect(address, timeout_s)`` makes a client, or raises StoreUnavailable."""
        self._connect = connect
        self._clock = clock
        self._clients: dict[Address, StoreClient] = {}
        self._dead = DeadLocations()

    def fetch(
        self,
        keys: Sequence[BlockKey],
        outs: Sequence[memoryview],
        locations: Sequence[Address],
        *,
        deadline_s: float,
        first: int = 0,
        cancelled: threading.Event | None = None,
    ) -> Fetched:
        """Copy ``keys[first:]`` to ``outs``, as many as there are.

        Args:
            keys: of the whole chain, from its first block.
            deadline_s: for everything together, connecting included.

        Raises:
            Cancelled: some of ``outs`` are written.
        """
        until_s = time.monotonic() + deadline_s
        count = 0
        misses: list[tuple[Address, str]] = []

        def done(_: int) -> None:
            nonlocal count
            count += 1

        live = [each for each in locations if not self._dead.is_dead(each, self._clock())]
        misses += [(each, "did not answer lately") for each in locations if each not in live]
        for index, location in enumerate(live):
            if count == len(outs):
                break
            remaining_s = until_s - time.monotonic()
            if remaining_s <= 0:
                misses.append((location, "no time was left"))
                continue
            limit_s = attempt_s(remaining_s, len(live) - index)
            attempt_until_s = time.monotonic() + limit_s
            try:
                client = self._client(location, limit_s)
                client.fetch(
                    keys,
                    outs[count:],
                    first=first + count,
                    deadline_s=max(0.0, attempt_until_s - time.monotonic()),
                    cancelled=cancelled,
                    done=done,
                )
            except StoreUnavailable as error:
                self._forget(location)
                self._dead.note(location, self._clock())
                misses.append((location, str(error)))
            except StoreError as error:  # it lives, but this block is not to be had there
                misses.append((location, str(error)))
            else:
                if count < len(outs):
                    misses.append((location, f"it has {first + count} blocks of the chain"))
        return Fetched(count, tuple(misses))

    def close(self) -> None:
        for location in tuple(self._clients):
            self._forget(location)

    def _client(self, location: Address, timeout_s: float) -> StoreClient:
        if location not in self._clients:
            self._clients[location] = self._connect(location, timeout_s)
        return self._clients[location]

    def _forget(self, location: Address) -> None:
        client = self._clients.pop(location, None)
        if client is not None:
            client.close()
