"""A node's part: which epochs it answers, what it says, and that a copy evicts nothing."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from pdserve.clock import MS
from pdserve.errors import CapacityError, FrameError, StoreUnavailable
from pdserve.ids import BlockKey, HostId, RequestId, StoreId, TicketId
from pdserve.kvstore.arena import Geometry, create_arena
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.masters.mastered import Mastered
from pdserve.kvstore.masters.mastering import (
    AskDeltas,
    AskParents,
    Copied,
    CopyChain,
    Deltas,
    Refused,
    Remembered,
    children_in,
    pack_ages,
)
from pdserve.kvstore.operations import Operations
from pdserve.kvstore.tickets import OwnerId
from pdserve.messages import Address

BLOCK_BYTES = 64
SLOTS = 6
SOURCE = Address(HostId("far"), "", "far:1")


def chain(name: int, count: int) -> list[BlockKey]:
    return [BlockKey(bytes([name, index]) * 8) for index in range(count)]


def content(key: BlockKey) -> bytes:
    return key * (BLOCK_BYTES // len(key))


class Far:
    """Another node, that has the leading blocks of every chain."""

    block_bytes = BLOCK_BYTES

    def __init__(self, count: int) -> None:
        self.count = count
        self.meanwhile: Any = lambda: None

    def fetch(
        self, keys: Sequence[BlockKey], outs: Sequence[memoryview], *, first: int, **_: Any
    ) -> int:
        there = max(0, min(self.count, len(keys)) - first)
        for position in range(there):
            outs[position][:] = content(keys[first + position])
        self.meanwhile()
        return there

    def close(self) -> None: ...


class Rig:
    def __init__(self, directory: Path, far: Far | None = None) -> None:
        self.arena = create_arena(directory / "arena", Geometry(SLOTS, BLOCK_BYTES), StoreId("s"))
        self.core = StoreCore(SLOTS)
        self.owner = self.core.connect("w")
        self.now_ns = 10**9
        operations = Operations(
            self.core, self.arena, None, clock=lambda: self.now_ns, settle=self.core.check
        )
        self.operations = operations

        def connect(address: Address, _: float) -> StoreClient:
            assert address == SOURCE
            if far is None:
                raise StoreUnavailable("dead")
            return cast("StoreClient", far)

        def commit(owner: OwnerId, write: int, checksums: Sequence[int]) -> None:
            for position, checksum in enumerate(checksums):
                self.core.filled(owner, write, position, checksum)
            self.core.commit(owner, write)

        self.node = Mastered(self.core, self.arena, operations, commit, self.core.check, connect)
        self.node.epoch = 5

    def heard_at(self, now_ns: int) -> None:
        """By the master, which asks again and again."""
        self.now_ns = now_ns
        self.node.deltas(AskDeltas(1, 5, -1))

    def put(self, keys: Sequence[BlockKey], tenant: str = "") -> None:
        grant = self.core.reserve(self.owner, keys, 0, tenant=tenant)
        for position in range(len(grant.slots)):
            self.core.filled(self.owner, grant.write, position, 0)
        self.core.commit(self.owner, grant.write)

    def copy(
        self, keys: Sequence[BlockKey], *, master_epoch: int = 1, ages: bytes = b""
    ) -> Copied | Refused:
        message = CopyChain(master_epoch, 5, b"".join(keys), SOURCE, 60_000, ages)
        return asyncio.run(self.node.copy(message))


def test_deltas_go_on_where_the_last_ones_ended(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.put(chain(1, 2))
    whole, body = rig.node.deltas(AskDeltas(1, 5, -1))
    assert isinstance(whole, Deltas)
    assert whole.is_whole
    assert (whole.added, whole.slots_free) == (2, SLOTS - 2)
    assert {bytes(body[0])[:16], bytes(body[0])[16:]} == set(chain(1, 2))
    rig.put(chain(2, 1))
    more, body = rig.node.deltas(AskDeltas(1, 5, whole.sequence))
    assert isinstance(more, Deltas)
    assert (more.is_whole, more.added, more.removed, body) == (False, 1, 0, (chain(2, 1)[0],))
    same, body = rig.node.deltas(AskDeltas(1, 5, more.sequence))
    assert isinstance(same, Deltas)
    assert (same.added, body) == (0, ())


def test_who_speaks_under_an_old_epoch_is_refused_in_everything(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Far(3))
    assert isinstance(rig.node.deltas(AskDeltas(3, 5, -1))[0], Deltas)
    assert rig.node.deltas(AskDeltas(2, 5, -1)) == (Refused(3, 5), ())
    assert asyncio.run(rig.node.parents(AskParents(2, 5))) == (Refused(3, 5), ())
    assert rig.copy(chain(1, 2), master_epoch=2) == Refused(3, 5)
    assert rig.node.deltas(AskDeltas(9, 4, -1)) == (Refused(3, 5), ()), "meant for a predecessor"
    assert isinstance(rig.node.deltas(AskDeltas(3, 5, -1))[0], Deltas), "and not heard otherwise"
    rig.node.epoch = 0
    assert rig.node.deltas(AskDeltas(9, 0, -1)) == (Refused(3, 0), ())


def test_parents_are_told(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.put(chain(1, 2), tenant="anna")
    parents, body = asyncio.run(rig.node.parents(AskParents(1, 5)))
    assert not isinstance(parents, Refused)
    first, second = chain(1, 2)
    children = list(children_in(bytes(body[0])))
    assert {child.key: child.parent for child in children} == {first: bytes(16), second: first}
    tenants = [parents.tenants[child.remembered.account] for child in children]
    assert tenants == ["anna", "anna"]
    with pytest.raises(FrameError, match="43 bytes of parents"):
        list(children_in(bytes(43)))


def test_a_copy_brings_what_is_missing_and_can_be_found(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Far(3))
    rig.put(chain(1, 1))
    assert rig.copy(chain(1, 4)) == Copied(2, 3)
    grant = rig.core.claim(rig.owner, chain(1, 4))
    assert bytes(rig.arena.payload(grant.slots[2])) == content(chain(1, 4)[2])
    assert rig.copy(chain(1, 3)) == Copied(0, 3)


def test_a_copy_evicts_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Far(8))
    rig.put(chain(1, 4))
    assert rig.copy(chain(2, 5)) == Copied(2, 2)
    assert rig.core.prefix_count(chain(1, 4)) == 4
    assert rig.copy(chain(3, 5)) == Copied(0, 0)
    assert rig.core.stat().evicted_count == 0


def test_nor_when_the_slots_go_while_it_is_fetched(tmp_path: Path) -> None:
    far = Far(8)
    rig = Rig(tmp_path, far)
    far.meanwhile = lambda: rig.put(chain(1, 5))
    assert rig.copy(chain(2, 3)) == Copied(0, 0)
    assert rig.core.prefix_count(chain(1, 5)) == 5
    assert rig.core.stat().evicted_count == 0


def test_a_copy_of_a_node_that_is_emptied_evicts_what_is_older(tmp_path: Path) -> None:
    rig = Rig(tmp_path, Far(8))
    rig.put(chain(1, 3))
    rig.heard_at(1000 * MS)
    rig.put(chain(2, 3))
    rig.heard_at(2000 * MS)
    rig.core.slots.unpin([])
    rig.heard_at(2500 * MS)
    rig.now_ns = 3000 * MS
    ages = pack_ages([Remembered(500, 2)] * 5)
    assert rig.copy(chain(3, 5), ages=ages) == Copied(5, 5)
    assert rig.core.prefix_count(chain(1, 3)) == 0
    assert rig.core.prefix_count(chain(2, 3)) == 1
    rig.core.release(rig.owner, rig.core.claim(rig.owner, chain(2, 3)).claim)
    old = pack_ages([Remembered(2500, 0)] * 5)
    assert rig.copy(chain(4, 5), ages=old) == Copied(0, 0, is_outweighed=True)
    with pytest.raises(FrameError, match="25 bytes of ages for 4 blocks"):
        rig.copy(chain(4, 4), ages=old)
    rig.core.check()


def test_a_node_that_drains_says_what_is_under_way(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    grant = rig.core.reserve(rig.owner, chain(1, 2), 0)
    request, ticket = RequestId("r"), TicketId("t")
    assert rig.core.open_ticket(
        rig.owner, ticket, request, 1, reader="*", block_count=1, deadline_ns=0
    )

    def under_way() -> int:
        deltas, _ = rig.node.deltas(AskDeltas(1, 5, -1))
        assert isinstance(deltas, Deltas)
        return deltas.under_way

    assert under_way() == 0, "nobody asks before it drains"
    rig.operations.draining = True
    assert under_way() == 2
    for position in range(2):
        rig.core.filled(rig.owner, grant.write, position, 0)
    rig.core.commit(rig.owner, grant.write)
    assert under_way() == 1
    rig.core.seal(rig.owner, ticket)
    assert under_way() == 0, "its reader waits for it, but no block will come"


def test_what_cannot_be_copied_is_said(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    with pytest.raises(StoreUnavailable):
        rig.copy(chain(1, 2))
    with pytest.raises(FrameError, match="a copy of 0 blocks"):
        rig.copy([])
    rig.operations.draining = True
    with pytest.raises(CapacityError, match="draining"):
        rig.copy(chain(1, 2))
    rig.core.check()
