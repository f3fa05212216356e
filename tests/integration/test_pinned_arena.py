"""A worker with a GPU and a store node on its host: blocks go between the pool and the node's arena
in one copy, all of a move begun together. The GPU is played (``late_copies``), the node is real."""

from contextlib import closing

import pytest
import torch

from bench.decode_loop import NAMESPACE
from bench.kvstore_node import running_node
from bench.pd_gpu import Client, carried_out
from bench.random_model import TINY
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Adopt, OpenTicket, Push, PushLayers, Put, Restore
from pdserve.ids import BlockId, RequestId
from pdserve.kvstore.keys import block_keys
from pdserve.messages import Address
from pdserve.model.pinned import PinnedMemory
from pdserve.model.pool import KvPool
from tests.unit.model.late_copies import LateCopies, Pages

COUNT = 5
BLOCK_TOKENS = 4
KEYS = block_keys(NAMESPACE, range(COUNT * BLOCK_TOKENS), BLOCK_TOKENS)
FIRST = tuple(map(BlockId, range(COUNT)))
SECOND = tuple(BlockId(COUNT + block) for block in FIRST)
REQUEST = RequestId("r")


class Worker:
    def __init__(self, store: Address) -> None:
        self.copies, self.pages = LateCopies(), Pages()
        self.pool = KvPool(
            TINY,
            block_count=2 * COUNT,
            block_tokens=BLOCK_TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
            copies=self.copies,
            pinned=PinnedMemory(self.pages),
        )
        self.pool.tensor[:COUNT] = torch.randn(self.pool.tensor[:COUNT].shape)
        self.mover = Mover(self.pool, Client("worker"), store, threaded=False)

    def check(self) -> None:
        assert torch.equal(self.pool.tensor[:COUNT], self.pool.tensor[COUNT:])
        assert not self.copies.under_way


@pytest.fixture(name="store", scope="module")
def _store() -> object:
    pool_bytes = TINY.layer_count * 2 * TINY.kv_head_count * BLOCK_TOKENS * TINY.head_dim * 4
    with running_node(slot_count=4 * COUNT, block_bytes=pool_bytes) as store:
        yield store


def test_a_prefix_leaves_and_comes_back_all_at_once(store: Address) -> None:
    worker = Worker(store)
    with closing(worker.mover):
        sizes = [writable for _, writable in worker.pages.locked.values()]
        assert sorted(sizes) == [False, True], "mapped to be read, and to be written"
        assert carried_out(worker.mover, Put(store, KEYS, FIRST)).count == COUNT
        assert (worker.copies.most, worker.copies.started) == (COUNT, COUNT)
        worker.copies.most = 0
        assert carried_out(worker.mover, Restore(store, KEYS, 0, SECOND)).count == COUNT
        assert (worker.copies.most, worker.copies.started) == (COUNT, 2 * COUNT)
        worker.check()
    assert not worker.pages.locked


def test_a_hand_off_by_layers_begins_with_all_blocks_of_a_layer(store: Address) -> None:
    worker = Worker(store)
    keys = block_keys(NAMESPACE, range(7, 7 + COUNT * BLOCK_TOKENS), BLOCK_TOKENS)
    with closing(worker.mover):
        opened = carried_out(
            worker.mover,
            OpenTicket(store, REQUEST, 0, reader="worker", block_count=COUNT, wait_ms=1000),
        )
        ticket = opened.ticket
        assert ticket is not None
        layers = PushLayers(store, REQUEST, 0, keys, 0, FIRST, tail=None, layers=1, done=None)
        carried_out(worker.mover, layers)
        assert (worker.copies.most, worker.copies.started) == (COUNT, COUNT)
        carried_out(worker.mover, Push(store, ticket, keys, 0, FIRST, seal=True))
        assert worker.copies.started == COUNT * TINY.layer_count
        carried_out(worker.mover, Adopt(store, ticket, SECOND))
        worker.check()
