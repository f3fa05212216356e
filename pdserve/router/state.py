"""Every request the router knows, each in exactly one place, and the moves between places.

    QUEUED                 in the queue
    PREFILLING             held by its prefill worker, and by its decode worker with blocks reserved
    HANDING_OFF            held by its decode worker, with blocks reserved
    DECODING               held by its decode worker, whose own reports count its blocks
    PARKED                 in the line of the parked, with its hand-off

Nothing here decides; it keeps the books, and ``check`` audits them. A request that ends, is lost,
refused or cancelled leaves through ``leave``, from wherever it is.
"""

import heapq
from collections import Counter, deque
from dataclasses import dataclass

from pdserve.clock import MS
from pdserve.config import RouterConfig
from pdserve.ids import BlockKey, RequestId, WorkerId
from pdserve.lifecycle import TERMINAL, Event, Phase, advance
from pdserve.messages import ChunkDone, Handoff, Request, Role, Timing
from pdserve.router.fleet import Fleet, Worker
from pdserve.router.levels import Ladder, LevelQueue

ORPHANS_MAX = 1024
"""Tickets remembered while no decode worker is there to free them; beyond, the oldest is left to
its store."""

DEAD_DEADLINES_MAX = 64
"""Deadlines of requests that are over, kept beyond as many as there are live ones."""


@dataclass(slots=True)
class Entry:
    """One live attempt of one request."""

    request: Request
    order: int  # of arrival
    virtual_ns: int  # virtual arrival; kept through preemptions
    queued_at_ns: int  # when the wait now running began
    phase: Phase = Phase.QUEUED
    level: int = 0
    floor_level: int = 0  # it was demoted: no level above this one any more
    level_served_us: int = 0  # compute time it got since it is in its level
    work_ns: int = 0  # predicted, when it was queued
    computed_tokens: int = 0  # by chunk reports: KV exists for so many
    cached_tokens: int = 0  # predicted for the prefill worker that holds it
    chunk_seen: bool = False  # since its last dispatch
    dispatched_ns: int = 0
    queued_us: int = 0  # all waits together
    prefill_us: int = 0  # all stretches that were preempted, together
    preempted_count: int = 0
    passed_over: int = 0  # later ones were dispatched before it because it fitted nowhere
    preempting: bool = False  # a Preempt is on its way
    prefill: WorkerId | None = None
    prefilled_by: WorkerId | None = None  # which may yet fail to hand it over
    decode: WorkerId | None = None
    reserved_blocks: int = 0
    handoff: Handoff | None = None  # while parked

    @property
    def id(self) -> RequestId:
        return self.request.request

    @property
    def uncomputed_tokens(self) -> int:
        """Of its prefill; at least 1, because the last token is always computed."""
        known_tokens = max(self.computed_tokens, self.cached_tokens)
        return max(1, len(self.request.tokens) - known_tokens)


class Deadlines:
    """When which request must be over. Removal is lazy; the heap stays within twice its use."""

    def __init__(self) -> None:
        self._instants: dict[RequestId, int] = {}
        self._heap: list[tuple[int, RequestId]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: RequestId, deadline_ns: int) -> None:
        self._instants[request] = deadline_ns
        heapq.heappush(self._heap, (deadline_ns, request))

    def remove(self, request: RequestId) -> None:
        self._instants.pop(request, None)
        if len(self._heap) > 2 * len(self._instants) + DEAD_DEADLINES_MAX:
            self._heap = [(instant, request) for request, instant in self._instants.items()]
            heapq.heapify(self._heap)

    def next_ns(self) -> int | None:
        while self._heap and self._instants.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now_ns: int) -> list[RequestId]:
        """Takes out those whose deadline has passed, earliest first."""
        passed = []
        while (instant_ns := self.next_ns()) is not None and instant_ns <= now_ns:
            _, request = heapq.heappop(self._heap)
            del self._instants[request]
            passed.append(request)
        return passed


class RouterState:
    def __init__(self, settings: RouterConfig, *, unix_zero_ms: int) -> None:
        self.settings = settings
        self.ladder = Ladder.of(settings)
        self.queue = LevelQueue(self.ladder)
        self.fleet = Fleet(believed_tokens_per_s=settings.prefill_tokens_per_s)
        self.entries: dict[RequestId, Entry] = {}
        self.parked: dict[RequestId, None] = {}  # first parked, first resumed
        self.deadlines = Deadlines()
        self.counters: Counter[str] = Counter()
        self.orphans: deque[Handoff] = deque(maxlen=ORPHANS_MAX)  # tickets to be freed
        self.queued_work_ns = 0
        self._unix_zero_ms = unix_zero_ms
        self._order = 0

    @property
    def preempts(self) -> bool:
        return self.settings.preemption and self.settings.policy != "fcfs"

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def deadline_ns(self, request: Request) -> int:
        return (request.deadline_unix_ms - self._unix_zero_ms) * MS

    def unix_us(self, now_ns: int) -> int:
        return self._unix_zero_ms * 1000 + now_ns // 1000

    # ── predictions ──────────────────────────────────────────────────────────────────────────────

    def cached_tokens(self, entry: Entry, worker: Worker) -> int:
        """Leading tokens that this worker would not have to compute, as far as we know.

        What the request itself computed before it was preempted is in the store, and counts
        wherever it goes.
        """
        hello = worker.hello
        keys: tuple[BlockKey, ...] = entry.request.block_keys
        blocks = self.fleet.index.prefix_blocks(keys, (hello.worker, hello.store_id))
        own_blocks = entry.computed_tokens // hello.block_tokens
        tokens = max(blocks, own_blocks) * hello.block_tokens
        return min(tokens, len(entry.request.tokens) - 1)

    def least_work_ns(self, entry: Entry) -> int:
        """Its prefill at the worker that has most of it cached."""
        workers = self.fleet.of(Role.PREFILL)
        cached = max((self.cached_tokens(entry, worker) for worker in workers), default=0)
        return self.fleet.rate.work_ns(len(entry.request.tokens) - cached)

    def remaining_ns(self, entry: Entry) -> int:
        return self.fleet.rate.work_ns(entry.uncomputed_tokens)

    def key_now_ns(self, entry: Entry) -> int:
        """Its key as if it joined now: it rises through the levels as its work shrinks."""
        level = max(entry.floor_level, self.ladder.level_of(self.remaining_ns(entry)))
        return self.ladder.key_ns(entry.virtual_ns, level)

    # ── moves ────────────────────────────────────────────────────────────────────────────────────

    def admit(self, request: Request, now_ns: int) -> Entry:
        entry = Entry(request, self._order, virtual_ns=now_ns, queued_at_ns=now_ns)
        self._order += 1
        self.entries[entry.id] = entry
        self.deadlines.add(entry.id, self.deadline_ns(request))
        entry.work_ns = self.least_work_ns(entry)
        entry.level = self.ladder.level_of(entry.work_ns)
        if entry.level > 0:
            self.counters["skips"] += 1
        self._join(entry)
        return entry

    def demote(self, entry: Entry, level: int) -> None:
        """It needs, or took, more than its level's quantum."""
        assert level > entry.level
        entry.level = entry.floor_level = level
        entry.level_served_us = 0
        self.counters["demotions"] += 1

    def demote_waiting(self, entry: Entry, work_ns: int) -> None:
        self._depart(entry)
        entry.work_ns = work_ns
        self.demote(entry, self.ladder.level_of(work_ns))
        self._join(entry)

    def dispatch(
        self, entry: Entry, prefill: Worker, decode: Worker, *, blocks: int, now_ns: int
    ) -> Timing:
        self._depart(entry)
        entry.phase = advance(entry.phase, Event.DISPATCHED)
        entry.cached_tokens = self.cached_tokens(entry, prefill)
        entry.queued_us += (now_ns - entry.queued_at_ns) // 1000
        entry.dispatched_ns = now_ns
        entry.prefill = prefill.id
        prefill.held[entry.id] = None
        self._bind(entry, decode, blocks)
        self.counters["dispatches"] += 1
        self.counters[f"picks_level_{entry.level}"] += 1
        return Timing(
            queued_us=entry.queued_us,
            prefill_us=entry.prefill_us,
            since_unix_us=self.unix_us(now_ns),
            preempted_count=entry.preempted_count,
            level=entry.level,
            prefill=prefill.id,
            decode=decode.id,
        )

    def requeue(self, entry: Entry, now_ns: int) -> None:
        """Preempted, or handed back unbegun. It keeps its virtual arrival."""
        self._release(entry)
        entry.phase = advance(entry.phase, Event.PREEMPTED)
        entry.preempting = entry.chunk_seen = False
        entry.cached_tokens = 0
        entry.prefill_us += (now_ns - entry.dispatched_ns) // 1000
        entry.queued_at_ns = now_ns
        entry.work_ns = self.least_work_ns(entry)
        entry.level = max(entry.floor_level, self.ladder.level_of(entry.work_ns))
        entry.level_served_us = 0
        self._join(entry)

    def computed(self, entry: Entry, chunk: ChunkDone) -> None:
        """After a chunk: it rises as its work shrinks, and falls when it took too much of it."""
        entry.chunk_seen = True
        entry.computed_tokens = chunk.computed_tokens
        entry.cached_tokens = min(entry.cached_tokens, chunk.computed_tokens)
        entry.level_served_us += chunk.elapsed_us
        if entry.computed_tokens >= len(entry.request.tokens):
            return
        level = max(entry.floor_level, self.ladder.level_of(self.remaining_ns(entry)))
        overdrawn = entry.level_served_us * 1000 > self.ladder.quanta_ns[entry.level]
        if level > entry.level:
            self.demote(entry, level)
        elif overdrawn and entry.level < self.ladder.last:
            self.demote(entry, entry.level + 1)
        elif level < entry.level:
            entry.level, entry.level_served_us = level, 0
            self.counters["promotions"] += 1

    def prefill_done(self, entry: Entry) -> None:
        entry.phase = advance(entry.phase, Event.PREFILL_DONE)
        entry.prefilled_by = entry.prefill
        self._release_prefill(entry)

    def adopt(self, entry: Entry) -> None:
        """From now on decode's own reports count its blocks."""
        entry.phase = advance(entry.phase, Event.ADOPTED)
        self._release_blocks(entry)

    def park(self, entry: Entry, handoff: Handoff) -> None:
        entry.phase = advance(entry.phase, Event.PARKED)
        self._release(entry)
        entry.handoff = handoff
        self.parked[entry.id] = None
        self.counters["parks"] += 1

    def resume(self, entry: Entry, decode: Worker, *, blocks: int) -> None:
        entry.phase = advance(entry.phase, Event.RESUMED)
        del self.parked[entry.id]
        entry.handoff = None
        self._bind(entry, decode, blocks)
        self.counters["resumes"] += 1

    def leave(self, entry: Entry, event: Event, counter: str) -> None:
        """The one way out, from any phase. The worker's part, if any, is the caller's to cancel."""
        if entry.phase is Phase.QUEUED:
            self._depart(entry)
        elif entry.phase is Phase.PARKED:
            del self.parked[entry.id]
        entry.phase = advance(entry.phase, event)
        self._release(entry)
        self.deadlines.remove(entry.id)
        del self.entries[entry.id]
        self.counters[counter] += 1

    def _join(self, entry: Entry) -> None:
        self.queue.push(entry.id, virtual_ns=entry.virtual_ns, order=entry.order, level=entry.level)
        self.queued_work_ns += entry.work_ns

    def _depart(self, entry: Entry) -> None:
        self.queue.remove(entry.id)
        self.queued_work_ns -= entry.work_ns

    def _bind(self, entry: Entry, decode: Worker, blocks: int) -> None:
        entry.decode = decode.id
        entry.reserved_blocks = blocks
        decode.held[entry.id] = None
        decode.reserved_blocks += blocks

    def _release(self, entry: Entry) -> None:
        self._release_prefill(entry)
        self._release_blocks(entry)
        decode = self.fleet.get(entry.decode)
        if decode is not None:
            del decode.held[entry.id]
        entry.decode = None

    def _release_prefill(self, entry: Entry) -> None:
        prefill = self.fleet.get(entry.prefill)
        if prefill is not None:
            del prefill.held[entry.id]
        entry.prefill = None

    def _release_blocks(self, entry: Entry) -> None:
        decode = self.fleet.get(entry.decode)
        if decode is not None:
            decode.reserved_blocks -= entry.reserved_blocks
        entry.reserved_blocks = 0

    # ── audit ────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Assert the invariants. Linear in everything; for tests."""
        self.queue.check()
        phases = {request: entry.phase for request, entry in self.entries.items()}
        assert not TERMINAL & set(phases.values())
        assert {r for r, phase in phases.items() if phase is Phase.PARKED} == set(self.parked)
        assert len(self.queue) == sum(phase is Phase.QUEUED for phase in phases.values())
        for entry in self.entries.values():
            assert (entry.id in self.queue) == (entry.phase is Phase.QUEUED)
            assert (entry.handoff is not None) == (entry.phase is Phase.PARKED)
            assert (entry.prefill is not None) == (entry.phase is Phase.PREFILLING)
            assert (entry.decode is None) == (entry.phase in (Phase.QUEUED, Phase.PARKED))
            for role, holder in ((Role.PREFILL, entry.prefill), (Role.DECODE, entry.decode)):
                holders = [w.id for w in self.fleet.of(role) if entry.id in w.held]
                assert holders == ([] if holder is None else [holder])
        for worker in self.fleet.all():
            held = [self.entries[request] for request in worker.held]
            if worker.hello.role is Role.DECODE:
                assert worker.reserved_blocks == sum(entry.reserved_blocks for entry in held)
        queued = [self.entries[r].work_ns for r in self.queue.in_order()]
        assert self.queued_work_ns == sum(queued)
