"""Reads, puts and hand-offs through a proxy that damages the stream: the right bytes, or an error.

A message that arrived with another bit could be a good message, for another block: that is what
this looks for, and why every byte is compared here with what its key says.
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace

from pdserve.errors import CapacityError, StoreError, WireError
from pdserve.ids import new_request_id
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.transfer import CALL_TIMEOUT_S
from pdserve.messages import Address
from tests.campaign.proxy import Proxy
from tests.campaign.world import BLOCK_BYTES, World, tail_bytes
from tests.integration.store_nodes import ELSEWHERE

HANG_S = CALL_TIMEOUT_S / 2
"""No damage here may make anybody wait for a deadline: lengths are not believed when wrong."""


@dataclass
class Damaged:
    """What came of it."""

    gets: int = 0
    handed: int = 0
    connections: int = 0
    found_wrong: int = 0  # blocks whose checksum failed; most of them came when sent again
    errors: Counter[str] = field(default_factory=Counter)
    damage: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def damage_count(self) -> int:
        return sum(self.damage.values())


class Victim:
    def __init__(self, address: Address, world: World, seed: int, result: Damaged) -> None:
        self._address = address
        self._world = world
        self._chance = random.Random(seed)
        self._result = result
        self._client: StoreClient | None = None
        self._out = bytearray(BLOCK_BYTES)

    def step(self) -> None:
        began_s = time.monotonic()
        try:
            if self._client is None:
                self._result.connections += 1
                self._client = StoreClient(self._address, host=ELSEWHERE, owner="victim")
            if self._chance.random() < 0.5:
                self._get(self._client)
            else:
                self._hand_over(self._client)
        except (StoreError, WireError, CapacityError) as error:
            self._result.errors[type(error).__name__] += 1
            self.leave()
        if time.monotonic() - began_s > HANG_S:
            self._result.wrong.append(f"waited for {time.monotonic() - began_s:.1f} s")

    def leave(self) -> None:
        if self._client is not None:
            self._result.found_wrong += self._client.counters["checksum_failures"]
            self._client.close()
            self._client = None

    def _get(self, client: StoreClient) -> None:
        contents = self._world.contents
        keys = self._world.choose(self._chance)
        client.put(keys, 0, lambda index, out: _fill(out, contents[keys[index]]))
        claim = client.claim(keys)
        for index in range(claim.count):
            client.read(claim, index, memoryview(self._out))
            self._compare(contents[keys[index]], f"block {index} of {claim}")
        client.release(claim)

    def _hand_over(self, client: StoreClient) -> None:
        contents = self._world.contents
        keys = self._world.choose(self._chance)[:4]
        ticket = client.open_ticket(
            new_request_id(), 0, reader="*", block_count=len(keys) + 1, wait_ms=0
        )
        client.push(ticket, keys, 0, lambda index, out: _fill(out, contents[keys[index]]))
        client.push_tail(ticket, lambda out: _fill(out, tail_bytes(ticket)))
        client.seal(ticket)
        claim = client.adopt(ticket)
        if (claim.count, claim.has_tail) != (len(keys), True):
            self._result.wrong.append(f"{claim} for {len(keys)} blocks and a tail")
            return
        for index, wanted in enumerate([*(contents[key] for key in keys), tail_bytes(ticket)]):
            client.read(claim, index, memoryview(self._out))
            self._compare(wanted, f"block {index} of {ticket}")
        client.release(claim)
        self._result.handed += 1

    def _compare(self, wanted: bytes, what: str) -> None:
        if self._out == wanted:
            self._result.gets += 1
        else:
            self._result.wrong.append(f"{what} has other bytes")


def _fill(out: memoryview, content: bytes) -> None:
    out[:] = content


def damage_streams(
    address: Address, world: World, seed: int, *, damage_min: int, seconds_max: float
) -> Damaged:
    """Until so many pieces were damaged, time is up, or something is wrong."""
    result = Damaged()
    proxy = Proxy(address.tcp, seed, ratio=0.05)
    victim = Victim(replace(address, tcp=proxy.address), world, seed, result)
    until_s = time.monotonic() + seconds_max
    try:
        while (
            not result.wrong
            and sum(proxy.damage.values()) < damage_min
            and time.monotonic() < until_s
        ):
            victim.step()
    finally:
        victim.leave()
        proxy.close()
        result.damage = proxy.damage
    return result
