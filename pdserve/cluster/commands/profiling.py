"""Measures what work costs on this machine: the points that ``router.fitting`` makes a model of.

    prefill   U tokens in chunks after H cached ones, and the first token drawn      runner.step
    decode    one step of B sequences with c tokens of context each, tokens drawn    runner.step
    host      park and restore of n blocks, by shared memory                         StoreClient
    handoff   a ticket's n blocks over TCP on this host's loopback                   StoreClient

One model, one pool, one store node, no Ray, no loop: what a worker's loop adds is left to the
correction that the router learns for each worker; how the workers of one machine disturb one
another is ``contention``'s to measure. A block's content takes no part in how long anything lasts,
so one computed chunk is copied over the whole pool: any H and c is there without being computed.

A point is the shortest of at least ``RUNS_MIN`` runs, more where they are short: whatever else the
machine does makes a run longer, never shorter. Each kind of point has a budget of seconds; its
points are taken from cheap to dear, and what would not fit any more is left out and counted. Points
beside the grid are held out of the fit, to say what its predictions are worth.
"""

import contextlib
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

from pdserve.cluster.compute_threads import cores_of_their_own
from pdserve.errors import ConfigError
from pdserve.ids import BLOCK_KEY_BYTES, BlockKey, HostId, TicketId, new_request_id
from pdserve.kvstore.child import arena_bytes, child_node
from pdserve.kvstore.client import StoreClient
from pdserve.messages import Address, Sampling
from pdserve.router.fitting import MovePoint, PrefillPoint, StepPoint
from pdserve.wire.hosts import local_host_id

if TYPE_CHECKING:
    from pdserve.model.runner import ModelRunner, Run

UNCACHED_TOKENS = (16, 64, 256, 512, 1024, 2048)
CACHED_TOKENS = (0, 512, 2048)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
CONTEXT_TOKENS = (64, 512, 2048)
MOVED_BLOCKS = (1, 4, 16, 64, 128)

HELD_OUT_PREFILL = ((700, 0), (100, 300), (1500, 100), (384, 1200))
HELD_OUT_DECODE = ((3, 500), (24, 200), (12, 700), (6, 1500))

PREFILL_BUDGET_S = 45.0
DECODE_BUDGET_S = 40.0
MOVES_BUDGET_S = 10.0
"""Together with loading the model less than two minutes."""

RUNS_MIN = 3
RUNS_MAX = 15
RUNS_S = 0.3  # of runs of one point, where they are short
MOVE_RUNS = 5
WARM_STEPS = 3
ROUND_TOKENS = 512  # of the prompt of a round
ROUND_SEQUENCES = 8
ROUND_STEPS = 16
ARENA_BLOCKS = 3 * MOVED_BLOCKS[-1]  # what is moved, what is not yet evicted, and room
ARENA_SHARE_MAX = 0.5  # of the shared memory that is free
TICKET_WAIT_MS = 1000
ELSEWHERE = HostId("elsewhere")  # a client that says it is there goes over TCP
GREEDY = Sampling(temperature=0.0)

Item = TypeVar("Item")
Point = TypeVar("Point")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Room:
    """What bounds a grid: of the model, of one worker, of this machine."""

    context_tokens: int
    pool_tokens: int
    block_tokens: int
    running_max: int

    def holds_prefill(self, uncached_tokens: int, cached_tokens: int) -> bool:
        end = uncached_tokens + cached_tokens
        return end <= min(self.context_tokens, self.pool_tokens)

    def holds_decode(self, sequences: int, context_tokens: int) -> bool:
        blocks = -(-context_tokens // self.block_tokens)  # ceil
        return (
            sequences <= self.running_max
            and context_tokens <= self.context_tokens
            and sequences * blocks * self.block_tokens <= self.pool_tokens
        )


@dataclass(slots=True)
class Taken(Generic[Point]):
    """The points of one kind."""

    points: list[Point] = field(default_factory=list)
    left_out: int = 0  # for want of time


@dataclass(frozen=True, slots=True)
class Measured:
    prefill: Taken[PrefillPoint]
    decode: Taken[StepPoint]
    host: Taken[MovePoint]
    handoff: Taken[MovePoint]
    held_out_prefill: Taken[PrefillPoint]
    held_out_decode: Taken[StepPoint]


def prefill_grid(room: Room) -> list[tuple[int, int]]:
    """(U, H), cheap ones first."""
    pairs = [(u, h) for h in CACHED_TOKENS for u in UNCACHED_TOKENS if room.holds_prefill(u, h)]
    return sorted(pairs, key=lambda pair: (pair[0], pair[1]))


def decode_grid(room: Room) -> list[tuple[int, int]]:
    """(B, context of each), cheap ones first."""
    pairs = [(b, c) for c in CONTEXT_TOKENS for b in SEQUENCES if room.holds_decode(b, c)]
    return sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[0]))


def within_budget(
    items: Sequence[Item],
    measure: Callable[[Item], Point],
    *,
    budget_s: float,
    now_s: Callable[[], float],
) -> Taken[Point]:
    """Measures ``items`` in order until the next one may not fit: each is taken to cost up to twice
    as much as the one before."""
    taken: Taken[Point] = Taken()
    end_s = now_s() + budget_s
    last_s = 0.0
    for index, item in enumerate(items):
        begun_s = now_s()
        if begun_s + 2 * last_s > end_s:
            taken.left_out = len(items) - index
            break
        taken.points.append(measure(item))
        last_s = now_s() - begun_s
    return taken


class Bench:
    """The runner with a pool full of KV, and a clock."""

    def __init__(self, runner: "ModelRunner", *, chunk_tokens: int, running_max: int) -> None:
        self.pool = runner.pool
        self.room = Room(
            context_tokens=runner.architecture.context_tokens,
            pool_tokens=self.pool.block_count * self.pool.block_tokens,
            block_tokens=self.pool.block_tokens,
            running_max=running_max,
        )
        self._runner = runner
        self._chunk_tokens = chunk_tokens
        draw = random.Random(1)
        self._tokens = [
            draw.randrange(runner.architecture.vocab_size) for _ in range(self.room.context_tokens)
        ]

    def fill(self) -> None:
        """Computes one chunk, which warms everything up, and copies it over the whole pool."""
        first = min(self._chunk_tokens, self.room.context_tokens, self.room.pool_tokens)
        self._prefill(first, 0)
        blocks = max(1, first // self.pool.block_tokens)
        for block in range(blocks, self.pool.block_count):
            self.pool.copy_block(block % blocks, block)
        for _ in range(WARM_STEPS):
            self._step(1, blocks)

    def prefill(self, pair: tuple[int, int]) -> PrefillPoint:
        uncached_tokens, cached_tokens = pair
        seconds = _shortest_s(partial(self._prefill, uncached_tokens, cached_tokens))
        return PrefillPoint(uncached_tokens, cached_tokens, seconds)

    def step(self, pair: tuple[int, int]) -> StepPoint:
        sequences, context_tokens = pair
        seconds = _shortest_s(partial(self._step, sequences, context_tokens))
        return StepPoint(sequences, sequences * context_tokens, seconds)

    def round_s(self) -> float:
        """Seconds of a bit of everything, as a busy worker does it: a prompt, then steps."""
        room = self.room
        tokens = min(ROUND_TOKENS, room.context_tokens, room.pool_tokens // ROUND_SEQUENCES)
        begun_s = time.perf_counter()
        self._prefill(tokens, 0)
        for _ in range(ROUND_STEPS):
            self._step(min(ROUND_SEQUENCES, room.running_max), tokens)
        return time.perf_counter() - begun_s

    def _prefill(self, uncached_tokens: int, cached_tokens: int) -> None:
        from pdserve.model.runner import Run

        end = cached_tokens + uncached_tokens
        blocks = range(self._blocks_for(end))
        for start in range(cached_tokens, end, self._chunk_tokens):
            chunk = self._tokens[start : min(start + self._chunk_tokens, end)]
            last = start + len(chunk) == end
            run = Run(chunk, start, blocks, wants_logits=last)
            self._run([run], drawn=last)

    def _step(self, sequences: int, context_tokens: int) -> None:
        from pdserve.model.runner import Run

        count = self._blocks_for(context_tokens)
        at = context_tokens - 1
        runs = [
            Run(self._tokens[at : at + 1], at, range(first, first + count))
            for first in range(0, sequences * count, count)
        ]
        self._run(runs, drawn=True)

    def _run(self, runs: Sequence["Run"], *, drawn: bool) -> None:
        from pdserve.model.sampler import SamplerRow, sample

        logits = self._runner.step(runs)
        if drawn:
            sample(logits, [SamplerRow(GREEDY, 0, 0, 0, run.tokens, 1) for run in runs])

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_tokens)  # ceil


class Moves:
    """Blocks between the pool, a store node's arena, and a client on "another host"."""

    def __init__(self, bench: Bench, store: Address) -> None:
        self._bench = bench
        self._store = store
        self._writer = self._client("writer", local_host_id())
        self._reader = self._client("reader", local_host_id())
        self._remote = self._client("remote", ELSEWHERE)
        self._staging = memoryview(bytearray(bench.pool.block_bytes))

    def close(self) -> None:
        for client in (self._writer, self._reader, self._remote):
            client.close()

    def park_and_restore(self, block_count: int) -> tuple[MovePoint, MovePoint]:
        """The two are about equally long, and the model has one price for both."""
        parks, restores = [], []
        for _ in range(MOVE_RUNS):
            begun_s = time.perf_counter()
            ticket = self._push(self._writer, block_count)
            parked_s = time.perf_counter()
            self._take(ticket, into_pool=True)
            parks.append(parked_s - begun_s)
            restores.append(time.perf_counter() - parked_s)
        moved_bytes = block_count * self._bench.pool.block_bytes
        return (
            MovePoint(moved_bytes, min(parks)),
            MovePoint(moved_bytes, min(restores)),
        )

    def handoff(self, block_count: int) -> MovePoint:
        seconds = []
        for _ in range(MOVE_RUNS):
            begun_s = time.perf_counter()
            ticket = self._push(self._remote, block_count)
            seconds.append(time.perf_counter() - begun_s)
            self._take(ticket, into_pool=False)
        moved_bytes = block_count * self._bench.pool.block_bytes
        return MovePoint(moved_bytes, min(seconds))

    def _push(self, client: StoreClient, block_count: int) -> TicketId:
        keys = [BlockKey(secrets.token_bytes(BLOCK_KEY_BYTES)) for _ in range(block_count)]
        ticket = client.open_ticket(
            new_request_id(),
            0,
            reader="reader",
            block_count=block_count,
            wait_ms=TICKET_WAIT_MS,
        )
        client.push(ticket, keys, 0, self._bench.pool.read_block)
        client.seal(ticket)
        return ticket

    def _take(self, ticket: TicketId, *, into_pool: bool) -> None:
        claim = self._reader.adopt(ticket)
        if into_pool:
            for index in range(claim.count):
                self._reader.read(claim, index, self._staging)
                self._bench.pool.write_block(index, self._staging)
        self._reader.release(claim)

    def _client(self, owner: str, host: HostId) -> StoreClient:
        return StoreClient(self._store, host=host, owner=owner, warm=True)


def measure(bench: Bench, say: Say, *, alone: bool = False) -> Measured:
    """Everything, in at most the sum of the budgets.

    Args:
        say: hears what is being done.
        alone: compute as a worker that has the cores to itself.
    """
    take = partial(within_budget, now_s=time.perf_counter)
    with cores_of_their_own(alone=alone):
        say("one chunk of prompt, copied over the pool")
        bench.fill()
        room = bench.room
        grid = prefill_grid(room)
        say(f"prefill: {len(grid)} points")
        prefill = take(grid, bench.prefill, budget_s=PREFILL_BUDGET_S)
        grid = decode_grid(room)
        say(f"decode steps: {len(grid)} points")
        decode = take(grid, bench.step, budget_s=DECODE_BUDGET_S)
        say("points held out of the fit")
        held_out_prefill = take(
            [pair for pair in HELD_OUT_PREFILL if room.holds_prefill(*pair)],
            bench.prefill,
            budget_s=PREFILL_BUDGET_S / 3,
        )
        held_out_decode = take(
            [pair for pair in HELD_OUT_DECODE if room.holds_decode(*pair)],
            bench.step,
            budget_s=DECODE_BUDGET_S / 3,
        )
    with store_node(bench.pool.block_bytes) as (address, slot_count):
        counts = [n for n in MOVED_BLOCKS if n <= min(slot_count // 3, bench.pool.block_count)]
        moves = Moves(bench, address)
        with contextlib.closing(moves):
            say(f"park, restore and hand-off: {3 * len(counts)} points")
            moves.park_and_restore(counts[-1])  # the first touch of shared memory is ten times dear
            both = take(counts, moves.park_and_restore, budget_s=MOVES_BUDGET_S)
            handoff = take(counts, moves.handoff, budget_s=MOVES_BUDGET_S)
    host = Taken([point for pair in both.points for point in pair], 2 * both.left_out)
    return Measured(
        prefill=prefill,
        decode=decode,
        host=host,
        handoff=handoff,
        held_out_prefill=held_out_prefill,
        held_out_decode=held_out_decode,
    )


@contextlib.contextmanager
def store_node(block_bytes: int) -> Iterator[tuple[Address, int]]:
    """A store node of our own: its address, and how many blocks it holds.

    Raises:
        ConfigError: shared memory is too short for any move.
        StoreUnavailable: it does not start.
    """
    free_bytes = shutil.disk_usage("/dev/shm").free
    slot_bytes = arena_bytes(1, block_bytes)
    slot_count = min(ARENA_BLOCKS, int(free_bytes * ARENA_SHARE_MAX) // slot_bytes)
    if slot_count < 3:
        raise ConfigError(
            f"/dev/shm has {free_bytes} bytes free, too few to move blocks of {block_bytes}; free "
            "some, or give the container a larger --shm-size"
        )
    tcp = ("--tcp-host", "127.0.0.1")
    with child_node(*tcp, slot_count=slot_count, block_bytes=block_bytes) as address:
        yield address, slot_count


def _shortest_s(action: Callable[[], None]) -> float:
    seconds: list[float] = []
    while len(seconds) < RUNS_MIN or (sum(seconds) < RUNS_S and len(seconds) < RUNS_MAX):
        begun_s = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun_s)
    return min(seconds)
