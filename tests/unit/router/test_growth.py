"""What a decode worker has left for one more stream, by what those there will grow to."""

import random

import pytest

from pdserve.clock import S
from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.router.entry import Entry
from pdserve.router.fleet import Fleet
from pdserve.router.growth import Growth
from pdserve.router.worker import Worker
from pdserve.router_config import RouterConfig
from pdserve.simulator.run import SimulationSettings, simulate
from pdserve.simulator.traces import Trace, TraceRequest
from tests.unit.router.build import BLOCK_TOKENS, hello, request
from tests.unit.router.entries import COSTS

BLOCKS = 100
ANSWER = 160
"""Tokens of every answer so far: ten blocks."""


class Pool:
    """One decode worker of 100 blocks of 16 tokens, and what runs there."""

    def __init__(self) -> None:
        self.entries: dict[RequestId, Entry] = {}
        self.growth = Growth(self.entries)
        fleet = Fleet(RouterConfig(), COSTS, self.growth.room_blocks)
        self.worker: Worker = fleet.add(hello("d0", block_count=BLOCKS), 0)
        for index in range(200):
            one = self.entry(f"past{index}", 10, 1000)
            one.generated_tokens = ANSWER
            self.growth.finished(one)

    def entry(self, name: str, tokens: int, max_tokens: int) -> Entry:
        asked = request(name, tokens, max_tokens=max_tokens)
        made = Entry(asked, order=0, arrived_ns=0, deadline_ns=S, queued_at_ns=0)
        made.phase = Phase.DECODING
        return made

    def run(self, name: str, tokens: int, *, generated: int = 0, max_tokens: int = 1000) -> None:
        one = self.entry(name, tokens, max_tokens)
        one.generated_tokens = generated
        one.context_tokens = tokens + generated
        self.entries[one.id] = one
        self.worker.streams[one.id] = None
        self.worker.context_tokens += one.context_tokens
        self.worker.free_blocks -= -(-one.context_tokens // BLOCK_TOKENS)

    @property
    def room(self) -> int:
        return self.growth.room_blocks(self.worker)


def test_an_empty_worker_gives_all_it_has() -> None:
    assert Pool().room == BLOCKS


def test_while_all_can_grow_what_is_free_is_room() -> None:
    pool = Pool()
    pool.run("r0", 160)
    assert pool.room == pool.worker.room_blocks == BLOCKS - 10 - 2


def test_room_is_what_the_streams_leave_when_they_have_grown() -> None:
    """Four of 10 blocks grow by 10 each, as will the new one: 40 + 50 of 95."""
    pool = Pool()
    for index in range(4):
        pool.run(f"r{index}", 160)
    assert pool.worker.room_blocks == BLOCKS - 40 - 5
    assert pool.room == pytest.approx(95 - 90, abs=8)


def test_whose_answer_is_nearly_over_needs_little_more() -> None:
    pool, late = Pool(), Pool()
    for index in range(4):
        pool.run(f"r{index}", 160)
        late.run(f"r{index}", 160 - 144, generated=144)
    assert late.room > pool.room + 15


def test_nobody_is_expected_to_exceed_what_it_asked_for() -> None:
    pool = Pool()
    for index in range(4):
        pool.run(f"r{index}", 160, max_tokens=16)
    # They are over when the new one has a block.
    assert pool.room == pytest.approx(95 - 44 - 1, abs=1)


def test_blocks_that_streams_share_count_once() -> None:
    """Four of 20 blocks, 19 of them the same: held are as many as by four of 6."""
    shared, own = Pool(), Pool()
    for index in range(4):
        shared.run(f"r{index}", 320)
        own.run(f"r{index}", 96)
    assert shared.room < own.room
    shared.worker.free_blocks = own.worker.free_blocks
    assert shared.room == own.room


def test_fewer_are_parked_in_a_cluster_that_looks_ahead() -> None:
    chance = random.Random(3)
    requests, at_ns = [], 0
    for _ in range(400):
        at_ns += round(chance.expovariate(2.0) * S)
        generated = max(1, round(chance.lognormvariate(5.5, 1.0)))
        requests.append(TraceRequest(at_ns, 200, generated))
    trace = Trace(tuple(requests), 16, "long answers")
    parks = {}
    for admission in ("eager", "peak"):
        router = RouterConfig(waiting_max=10**6, queue_age_max_ms=None, decode_admission=admission)
        settings = SimulationSettings(
            router=router, prefill_workers=2, decode_workers=1, decode_tokens=6_000
        )
        result = simulate(trace, settings)
        assert result.finished.all()
        parks[admission] = result.counters.get("parks", 0)
    assert 0 < parks["peak"] < 0.7 * parks["eager"]
