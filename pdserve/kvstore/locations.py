"""Prefixes that other hosts have: who they are a master says, what they have ``failover`` gets.

What a master said is believed for ``FRESH_NS`` and for at most ``KNOWN_MAX`` chains. A belief that
is wrong costs a miss: blocks are asked for by their keys and verified. Without a master nobody is
known to have anything, and nobody waits for an answer more than once a second.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.clock import Clock, S, monotonic
from pdserve.errors import StaleEpoch
from pdserve.ids import BlockKey, StoreId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.failover import FailoverReader
from pdserve.kvstore.masters.client import QuietAfterFailure
from pdserve.kvstore.masters.protocol import Location
from pdserve.messages import Address

FRESH_NS = 1 * S
KNOWN_MAX = 1024
LOCATIONS_TRIED = 4
PIECE_BYTES = 8 << 20
"""Fetched at once, and so the memory that a prefix on its way takes."""

COUNTERS = (
    "prefixes_elsewhere",  # of which another host had more than this one
    "blocks_elsewhere",  # that were fetched from there
    "locations_failed",  # hosts that did not give what a master said they had
)


class Masters(Protocol):
    """What is needed of ``MasterClient``."""

    def locate(self, keys: Sequence[BlockKey], *, reads: int = 1) -> tuple[Location, ...]: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Known:
    locations: tuple[Location, ...]
    until_ns: int
    reads: int = 0  # since it was asked for


class RemotePrefixes:
    """For one thread."""

    def __init__(
        self,
        masters: Masters,
        connect: Callable[[Address, float], StoreClient],
        *,
        own: Callable[[], StoreId | None],
        clock: Clock = monotonic,
    ) -> None:
        """
        Args:
            connect: as for ``FailoverReader``.
            own: this host's store, which is not elsewhere; None while it is not known.
        """
        self._masters = masters
        self._connect = connect
        self._own = own
        self._clock = clock
        self._quiet = QuietAfterFailure(clock)
        self._reader = FailoverReader(self._connected, clock=clock)
        self._epochs: dict[Address, int] = {}  # that a location must have, of the last ones used
        self._known: OrderedDict[BlockKey, _Known] = OrderedDict()
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))

    @property
    def counters(self) -> Mapping[str, int]:
        return self._counters

    def count(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of a chain some other host has."""
        return max((each.count for each in self._locations(keys)), default=0)

    def fetch(
        self,
        keys: Sequence[BlockKey],
        first: int,
        end: int,
        take: Callable[[int, memoryview], None],
        *,
        block_bytes: int,
        deadline_s: float,
    ) -> int:
        """Give ``keys[first:end]`` to ``take(index, bytes)``, each verified, which must be done
        with them when it returns. How many there are; the rest is to be had from nobody in time.

        Args:
            deadline_s: for everything together, fail-over included.
        """
        having = [each for each in self._locations(keys) if each.count > first][:LOCATIONS_TRIED]
        if not having or first >= end:
            return 0
        known = self._known.get(keys[-1])
        if known is not None:
            known.reads += 1
        self._counters["prefixes_elsewhere"] += 1
        self._epochs = {each.address: each.epoch for each in having}
        until_ns = self._clock() + int(deadline_s * S)
        piece = min(end - first, max(1, PIECE_BYTES // block_bytes))
        room = [memoryview(bytearray(block_bytes)) for _ in range(piece)]
        done = first
        while done < end and (left_ns := until_ns - self._clock()) > 0:
            outs = room[: end - done]
            fetched = self._reader.fetch(
                keys[: done + len(outs)],
                outs,
                [each.address for each in having],
                deadline_s=left_ns / S,
                first=done,
            )
            self._counters["locations_failed"] += len(fetched.misses)
            for position in range(fetched.count):
                take(done + position, outs[position])
            done += fetched.count
            if fetched.count < len(outs):
                self._known.pop(keys[-1], None)  # it was wrong: ask again, next time
                break
        self._counters["blocks_elsewhere"] += done - first
        return done - first

    def close(self) -> None:
        self._reader.close()
        self._masters.close()

    def _locations(self, keys: Sequence[BlockKey]) -> tuple[Location, ...]:
        if not keys:
            return ()
        known = self._known.get(keys[-1])
        now_ns = self._clock()
        if known is None or now_ns >= known.until_ns:
            reads = 0 if known is None else known.reads
            nobody: tuple[Location, ...] = ()
            found = self._quiet.ask(lambda: self._masters.locate(keys, reads=reads), nobody)
            known = _Known(found, now_ns + FRESH_NS)
            self._known[keys[-1]] = known
            if len(self._known) > KNOWN_MAX:
                self._known.popitem(last=False)
        self._known.move_to_end(keys[-1])
        own = self._own()
        return tuple(each for each in known.locations if each.store_id != own)

    def _connected(self, address: Address, timeout_s: float) -> StoreClient:
        client = self._connect(address, timeout_s)
        wanted = self._epochs.get(address, 0)
        if client.epoch < wanted:
            client.close()
            raise StaleEpoch(
                f"{client.store_id} serves under epoch {client.epoch}, the member has {wanted}"
            )
        return client
