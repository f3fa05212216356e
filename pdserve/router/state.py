"""Every request the router knows, each in exactly one place, and the moves between places.

    QUEUED                 in a line: the shared one, or that of the worker it was bound to
    PREFILLING             among its prefill worker's prompts, and its decode worker's streams, with
                           blocks reserved
    HANDING_OFF            among its decode worker's streams, with blocks reserved
    DECODING               among its decode worker's streams, whose own reports count its blocks
    PARKED                 in the line of the parked, with its hand-off

Nothing here decides; it keeps the books, and ``check`` audits them. A request that ends, is lost,
refused or cancelled leaves through ``leave``, from wherever it is.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Final

from pdserve.clock import MS
from pdserve.ids import RequestId, WorkerId
from pdserve.lifecycle import TERMINAL, Event, Phase, advance
from pdserve.messages import ChunkDone, Decision, Handoff, Request, ServiceClass, Timing
from pdserve.router.costs import CostModel
from pdserve.router.deadlines import Deadlines
from pdserve.router.decode_base import DecodeOrder
from pdserve.router.entry import Entry, Unconfirmed
from pdserve.router.fleet import Fleet
from pdserve.router.growth import Growth
from pdserve.router.lines import Lines
from pdserve.router.orders.base import Order
from pdserve.router.orders.skip_join import SkipJoin
from pdserve.router.overload import TenantQueues
from pdserve.router.placement import Choice, blocks_of, least_uncached
from pdserve.router.prefix_index import Hits
from pdserve.router.worker import Held, Worker
from pdserve.router_config import RouterConfig

ORPHANS_MAX = 1024
"""Tickets remembered while no decode worker is there to free them; beyond, the oldest is left to
its store."""

RECOMPUTED_SHARE_MAX: Final = 0.01
"""Of all prompt tokens, how many may be computed again because prefills were called back."""

RECOMPUTE_CREDIT_MAX: Final = 16_384
"""Tokens that may be lost before any share is known, and after a long time without losses."""

DECISIONS_MAX: Final = 8
"""Of one request, the latest."""

_PICKS: Final = [f"picks_level_{level}" for level in range(64)]  # more than any order has


class RouterState:
    def __init__(
        self,
        settings: RouterConfig,
        costs: CostModel,
        *,
        new_order: Callable[[Counter[str]], Order],
        decode_order: DecodeOrder,
        oracle: Callable[[RequestId], int] | None,
        unix_zero_ms: int,
    ) -> None:
        self.settings = settings
        self.counters: Counter[str] = Counter()
        self.entries: dict[RequestId, Entry] = {}
        self.growth = Growth(self.entries)
        grows = settings.decode_admission == "peak"
        self.fleet = Fleet(settings, costs, self.growth.room_blocks if grows else None)
        self.lines = Lines(lambda: new_order(self.counters))
        self.decode_order = decode_order
        self.oracle = oracle
        self.ask_swaps_ns = 0  # not before
        self.suspects: dict[RequestId, Entry] = {}  # of earlier deaths
        self.parked: dict[RequestId, None] = {}  # first parked, first resumed
        self.yielding: dict[RequestId, None] = {}  # prefills told to yield, and not back yet
        self.recompute_credit = float(RECOMPUTE_CREDIT_MAX)  # tokens; below 0 nobody is called back
        self.touched: dict[WorkerId, None] = {}  # workers whose prompts changed
        self.vacating: dict[
            WorkerId, int
        ] = {}  # workers with work of a former role; ask again when
        self._watchers: dict[Hashable, list[Entry]] = {}  # who waits, and lacks this block next
        self.look_again_ns: int | None = None  # when somebody has waited enough for a better worker
        self.deadlines = Deadlines()
        self.orphans: deque[Handoff] = deque(maxlen=ORPHANS_MAX)  # tickets to be freed
        self.unconfirmed: deque[Unconfirmed] = deque(maxlen=ORPHANS_MAX)  # their requests are gone
        self.patience = Deadlines()  # of those who wait for their first dispatch
        self.tenants = TenantQueues(settings.tenant_weights)
        self.computed_work_ns = 0  # predicted, of all chunks so far
        self.queued_work_ns = 0
        self.arrived_work_ns = 0  # predicted, of all that were ever admitted
        self.bound_work_ns: Counter[WorkerId | None] = Counter()  # the same, by line
        self._unix_zero_ms = unix_zero_ms
        self._order = 0

    # ── time ─────────────────────────────────────────────────────────────────────────────────────

    def deadline_ns(self, request: Request) -> int:
        return (request.deadline_unix_ms - self._unix_zero_ms) * MS

    def unix_us(self, now_ns: int) -> int:
        return self._unix_zero_ms * 1000 + now_ns // 1000

    def age_max_ms(self, request: Request) -> float | None:
        """How long it may wait for its first dispatch."""
        settings = self.settings
        if (own_ms := settings.ttft_max_ms.get(str(request.service_class))) is not None:
            return own_ms
        is_batch = request.service_class is ServiceClass.BATCH
        return None if is_batch else settings.queue_age_max_ms

    # ── predictions ──────────────────────────────────────────────────────────────────────────────

    def hits(self, entry: Entry) -> Hits:
        """Who has how much of it. Whoever waits is asked again and again, so it is remembered."""
        hits, version = entry.hits, self.fleet.index.version
        if hits is None or entry.hits_version != version:
            keys = entry.request.block_keys
            hits = entry.hits = self.fleet.hits(keys)
            entry.stored_blocks = self.fleet.index.stored_blocks(keys) if self.fleet.fetches else 0
            entry.hits_version = version
        return hits

    def predict(self, entry: Entry, hits: Hits) -> None:
        """Its work, at the worker that has most of it cached; to be looked at again once somebody
        has the next block."""
        keys: tuple[Hashable, ...] = entry.request.block_keys
        blocks = hits[-1][0] if hits else 0
        entry.watched = keys[blocks] if blocks < len(keys) else None
        if entry.watched is not None:
            self._watchers.setdefault(entry.watched, []).append(entry)
        uncached_tokens = least_uncached(entry, hits, self.fleet.block_tokens)
        entry.uncached_tokens = uncached_tokens
        cached_tokens = entry.total_tokens - uncached_tokens
        entry.work_ns = self.fleet.work_ns(uncached_tokens, cached_tokens)

    # ── moves ────────────────────────────────────────────────────────────────────────────────────

    def admit(self, request: Request, now_ns: int) -> Entry:
        entry = Entry(
            request,
            order=self._order,
            arrived_ns=now_ns,
            deadline_ns=self.deadline_ns(request),
            queued_at_ns=now_ns,
        )
        self._order += 1
        self.entries[entry.id] = entry
        if request.deaths:
            self.suspects[entry.id] = entry
        self.deadlines.add(entry.id, entry.deadline_ns)
        self.predict(entry, self.hits(entry))
        self.arrived_work_ns += entry.work_ns
        if request.attempt == 0 and (age_max_ms := self.age_max_ms(request)) is not None:
            # Dispatched any later, its first token would be too late.
            patience_ns = max(0, round(age_max_ms * MS) - entry.work_ns)
            self.patience.add(entry.id, now_ns + patience_ns)
        return entry

    def enqueue(self, entry: Entry, bound_to: WorkerId | None, now_ns: int) -> None:
        entry.bound_to = bound_to
        if bound_to is not None:
            self.lines.own(bound_to)
        self.lines.of(entry).push(entry, now_ns)
        self._count(entry, 1)

    def defer(self, entry: Entry, until_ns: int, awaited_bits: int) -> None:
        """It had better wait for one of those workers, and stands aside."""
        self.lines.of(entry).remove(entry)
        self.lines.aside.add(entry, until_ns, awaited_bits)

    def recall(self, now_ns: int) -> bool:
        """Back to its line, who stood aside for a worker that is open now: the best of them. Also
        all that have waited enough. Whether there were any."""
        shared, aside, fleet = self.lines.shared, self.lines.aside, self.fleet
        if fleet.soonest_open_ns() > now_ns < aside.next_ns:
            return False
        due = aside.take_due(fleet.open_bits(now_ns), now_ns, shared)
        for entry in due:
            shared.push(entry, now_ns)
        return bool(due)

    def unbind(self, entry: Entry) -> None:
        """The worker it waited for is gone."""
        self.lines.of(entry).remove(entry)
        self.lines.of(entry).forget(entry)
        self._unqueue(entry)
        entry.bound_to = None

    def reconsider(self, entry: Entry, hits: Hits, now_ns: int) -> bool:
        """What of it is cached has changed while it waited: its work is another. Whether so."""
        if least_uncached(entry, hits, self.fleet.block_tokens) == entry.uncached_tokens:
            return False
        if entry.id in self.lines.aside:
            self.lines.aside.remove(entry)
            self.lines.of(entry).push(entry, now_ns)
        self._unqueue(entry)
        self.predict(entry, hits)
        if entry.shadow_job is not None:
            entry.shadow_job.work_ns = entry.work_ns
        self._count(entry, 1)
        self.lines.of(entry).refresh(entry, now_ns)
        return True

    def blocks_came(self, added: Iterable[Hashable], now_ns: int) -> None:
        """Workers have blocks that they did not have: those who wait for them have less to do."""
        for key in added:
            for entry in self._watchers.pop(key, ()):
                if entry.watched == key and entry.phase is Phase.QUEUED:
                    self.reconsider(entry, self.hits(entry), now_ns)

    def dispatch(self, entry: Entry, choice: Choice, now_ns: int) -> Timing:
        order = self.lines.of(entry)
        order.dispatched(entry, now_ns)
        order.remove(entry)
        self._unqueue(entry)
        self.patience.remove(entry.id)
        entry.hits = entry.shadow_job = None  # from now on its work shrinks because it is done
        entry.phase = advance(entry.phase, Event.DISPATCHED)
        entry.cached_tokens = choice.cached_tokens
        entry.uncached_tokens = choice.uncached_tokens
        waited_us = (now_ns - entry.queued_at_ns) // 1000
        entry.queued_us += waited_us
        entry.dispatched_ns, entry.vouched_by = now_ns, ()
        entry.deferred_ns = None
        unix_us = self.unix_us(now_ns)
        prefill, decode = choice.prefill, choice.decode
        entry.prefill = prefill.id
        prefill.take(entry.id, self._held(entry, is_new=True), choice.ahead_of)
        prefill.free_at_ns = max(prefill.free_at_ns, now_ns) + choice.work_ns
        self._bind(entry, decode)
        self._touch(prefill)
        self.counters["dispatches"] += 1
        self.counters[_PICKS[entry.level]] += 1
        # By position: names would double what these two cost, and every dispatch makes them.
        decision = Decision(
            unix_us,
            choice.reason,
            waited_us,
            entry.level,
            choice.work_ns // 1000,
            choice.cached_tokens,
            prefill.id,
            decode.id,
            choice.price_ns // 1000,
            _in_us(choice.others),
        )
        self._decide(entry, decision)
        step_us = handoff_us = cached_tokens = parked_count = 0  # for workers to fill in
        return Timing(
            entry.queued_us,
            entry.prefill_us,
            step_us,
            handoff_us,
            unix_us,
            cached_tokens,
            entry.preempted_count,
            parked_count,
            entry.level,
            prefill.id,
            decode.id,
            entry.decisions,
        )

    def requeue(self, entry: Entry, now_ns: int) -> None:
        """Preempted, or handed back unbegun. It keeps its arrival, and its binding."""
        self._release(entry, now_ns)
        entry.phase = advance(entry.phase, Event.PREEMPTED)
        self.yielding.pop(entry.id, None)
        entry.preempting = entry.begun = False
        entry.cached_tokens = 0
        entry.prefill_us += (now_ns - entry.dispatched_ns) // 1000
        entry.queued_at_ns = now_ns
        self.predict(entry, self.hits(entry))
        self.enqueue(entry, entry.bound_to, now_ns)

    def computed(self, entry: Entry, chunk: ChunkDone, worker: Worker, now_ns: int) -> None:
        """After a chunk: less is left of it, for its worker and for its order."""
        entry.begun = True
        known_tokens = max(entry.computed_tokens, entry.cached_tokens)
        if chunk.computed_tokens > known_tokens:
            earned = RECOMPUTED_SHARE_MAX * (chunk.computed_tokens - known_tokens)
            self.recompute_credit = min(RECOMPUTE_CREDIT_MAX, self.recompute_credit + earned)
        elif entry.preempted_count > 0:  # what it had computed was not found again
            self.recompute_credit -= known_tokens - chunk.computed_tokens
            self.counters["tokens_lost"] += known_tokens - chunk.computed_tokens
        entry.computed_tokens = chunk.computed_tokens
        entry.cached_tokens = min(entry.cached_tokens, chunk.computed_tokens)
        left = self._held(entry, is_new=False)
        self.computed_work_ns += max(0, worker.prompts[entry.id].work_ns - left.work_ns)
        worker.prompts[entry.id] = left
        worker.free_at_ns = now_ns + round(worker.left_ns)
        left_tokens = entry.total_tokens - entry.computed_tokens
        if left_tokens > 0:
            entry.uncached_tokens = left_tokens
            entry.work_ns = self.fleet.work_ns(left_tokens, entry.computed_tokens)
            self.lines.of(entry).served(entry, chunk.elapsed_us, now_ns)
        self._touch(worker)

    def prefill_done(self, entry: Entry, now_ns: int) -> None:
        entry.phase = advance(entry.phase, Event.PREFILL_DONE)
        entry.prefilled_by = entry.prefill
        prefill = self.fleet.get(entry.prefill)
        if prefill is not None:
            self.computed_work_ns += prefill.prompts[entry.id].work_ns
        self._release_prefill(entry, now_ns)
        self._forget_order(entry)

    def adopt(self, entry: Entry, now_ns: int) -> None:
        """From now on decode's own reports count its blocks."""
        entry.phase = advance(entry.phase, Event.ADOPTED)
        entry.adopted_ns = now_ns
        entry.resumed = None
        self._release_blocks(entry)

    def attained(self, entry: Entry, decode: Worker, generated_tokens: int) -> None:
        more = generated_tokens - entry.generated_tokens
        if more > 0:
            entry.generated_tokens = generated_tokens
            entry.context_tokens += more
            decode.context_tokens += more

    def park(self, entry: Entry, handoff: Handoff, now_ns: int) -> None:
        entry.phase = advance(entry.phase, Event.PARKED)
        self._release(entry, now_ns)
        entry.handoff, entry.resumed = handoff, None
        entry.parked_count += 1
        entry.preempting = False
        entry.queued_at_ns = now_ns
        entry.generated_tokens = handoff.length - entry.request.prompt_tokens
        self.parked[entry.id] = None
        self.counters["parks"] += 1

    def resume(self, entry: Entry, decode: Worker, now_ns: int) -> Handoff:
        """Its hand-off, to be sent to ``decode``, with this decision entered."""
        handoff = entry.handoff
        assert handoff is not None
        entry.phase = advance(entry.phase, Event.RESUMED)
        del self.parked[entry.id]
        entry.handoff, entry.resumed, entry.vouched_by = None, handoff, ()
        self._bind(entry, decode, tokens=handoff.length)
        self.counters["resumes"] += 1
        self._decide(
            entry,
            Decision(
                at_unix_us=self.unix_us(now_ns),
                reason="resumed",
                waited_us=(now_ns - entry.queued_at_ns) // 1000,
                level=entry.level,
                work_us=0,
                cached_tokens=handoff.length - 1,
                prefill=None,
                decode=decode.id,
            ),
        )
        return handoff

    def leave(self, entry: Entry, event: Event, counter: str, now_ns: int) -> None:
        """The one way out, from any phase. The worker's part, if any, is the caller's to cancel."""
        if entry.phase is Phase.QUEUED:
            aside = self.lines.aside
            (aside if entry.id in aside else self.lines.of(entry)).remove(entry)
            self._unqueue(entry)
        elif entry.phase is Phase.PARKED:
            del self.parked[entry.id]
        entry.phase = advance(entry.phase, event)
        self._release(entry, now_ns)
        self._forget_order(entry)
        self.deadlines.remove(entry.id)
        self.patience.remove(entry.id)
        self.suspects.pop(entry.id, None)
        del self.entries[entry.id]
        self.counters[counter] += 1

    def _unqueue(self, entry: Entry) -> None:
        """Neither its work nor its wish for a block counts any more."""
        self._count(entry, -1)
        if entry.watched is not None:
            watchers = self._watchers.get(entry.watched, [])
            if entry in watchers:
                watchers.remove(entry)
            if not watchers:
                self._watchers.pop(entry.watched, None)
            entry.watched = None

    def _count(self, entry: Entry, sign: int) -> None:
        """Its work waits, or waits no more."""
        self.queued_work_ns += sign * entry.work_ns
        self.bound_work_ns[entry.bound_to] += sign * entry.work_ns
        if sign > 0:
            self.tenants.entered(entry.request.tenant, entry.work_ns)
        else:
            self.tenants.left(entry.request.tenant, entry.work_ns)

    def _forget_order(self, entry: Entry) -> None:
        """Its prefill is over."""
        self.lines.of(entry).forget(entry)
        self.yielding.pop(entry.id, None)
        entry.bound_to = None
        entry.preempting = False

    def _decide(self, entry: Entry, decision: Decision) -> None:
        entry.decisions = (*entry.decisions[1 - DECISIONS_MAX :], decision)

    def _held(self, entry: Entry, *, is_new: bool) -> Held:
        """What is left to compute of it, where it was sent to."""
        tokens = entry.uncomputed_tokens
        done_tokens = entry.total_tokens - tokens
        work_ns = self.fleet.costs.chunk_ns(tokens, done_tokens, is_first=is_new)
        return Held(tokens, work_ns, is_new=is_new)

    def _touch(self, worker: Worker) -> None:
        self.touched[worker.id] = None
        self.fleet.changed(worker)

    def _bind(self, entry: Entry, decode: Worker, *, tokens: int | None = None) -> None:
        tokens = entry.total_tokens if tokens is None else tokens
        entry.decode = decode.id
        entry.context_tokens = tokens
        blocks = blocks_of(tokens + 1, decode.hello.block_tokens)
        entry.reserved_blocks = blocks + entry.beam_blocks
        decode.streams[entry.id] = None
        decode.reserved_blocks += entry.reserved_blocks
        decode.context_tokens += tokens
        self.fleet.changed(decode)

    def _release(self, entry: Entry, now_ns: int) -> None:
        self._release_prefill(entry, now_ns)
        decode = self.fleet.get(entry.decode)
        if decode is not None:
            decode.reserved_blocks -= entry.reserved_blocks
            decode.context_tokens -= entry.context_tokens
            del decode.streams[entry.id]
            self.fleet.changed(decode)
        entry.reserved_blocks = entry.context_tokens = 0
        entry.decode = None

    def _release_prefill(self, entry: Entry, now_ns: int) -> None:
        prefill = self.fleet.get(entry.prefill)
        if prefill is not None:
            del prefill.prompts[entry.id]
            if not prefill.prompts:
                prefill.free_at_ns = now_ns
            self._touch(prefill)
        entry.prefill = None

    def _release_blocks(self, entry: Entry) -> None:
        decode = self.fleet.get(entry.decode)
        if decode is not None:
            decode.reserved_blocks -= entry.reserved_blocks
            self.fleet.changed(decode)
        entry.reserved_blocks = 0

    # ── audit ────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Assert the invariants. Linear in everything; for tests."""
        for order in self.lines.all():
            order.check()
        self.lines.aside.check(self.lines.shared)
        phases = {request: entry.phase for request, entry in self.entries.items()}
        assert not TERMINAL & set(phases.values())
        assert {r for r, phase in phases.items() if phase is Phase.PARKED} == set(self.parked)
        assert len(self.lines) == sum(phase is Phase.QUEUED for phase in phases.values())
        queued_work_ns = 0
        for entry in self.entries.values():
            places = (entry.id in self.lines.of(entry)) + (entry.id in self.lines.aside)
            assert places == (entry.phase is Phase.QUEUED)
            queued_work_ns += entry.work_ns if entry.phase is Phase.QUEUED else 0
            order = self.lines.of(entry)
            if isinstance(order, SkipJoin) and entry.phase is Phase.PREFILLING:
                order.check_level(entry)
            if entry.hits is not None and entry.hits_version == self.fleet.index.version:
                assert entry.hits == self.fleet.hits(entry.request.block_keys)
            assert (entry.handoff is not None) == (entry.phase is Phase.PARKED)
            assert entry.resumed is None or entry.phase is Phase.HANDING_OFF
            assert (entry.prefill is not None) == (entry.phase is Phase.PREFILLING)
            assert (entry.decode is None) == (entry.phase in (Phase.QUEUED, Phase.PARKED))
            prefills = [w.id for w in self.fleet.all() if entry.id in w.prompts]
            assert prefills == ([] if entry.prefill is None else [entry.prefill])
            decodes = [w.id for w in self.fleet.all() if entry.id in w.streams]
            assert decodes == ([] if entry.decode is None else [entry.decode])
        assert self.queued_work_ns == queued_work_ns
        assert set(self.yielding) <= {r for r, entry in self.entries.items() if entry.preempting}
        for worker in self.fleet.all():
            streams = [self.entries[request] for request in worker.streams]
            assert worker.reserved_blocks == sum(entry.reserved_blocks for entry in streams)
            assert worker.context_tokens == sum(entry.context_tokens for entry in streams)
            for request, held in worker.prompts.items():
                assert held.tokens == self.entries[request].uncomputed_tokens
        self.fleet.check()


def _in_us(prices: tuple[tuple[WorkerId, int], ...]) -> tuple[tuple[WorkerId, int], ...]:
    return tuple([(worker, price_ns // 1000) for worker, price_ns in prices]) if prices else ()
