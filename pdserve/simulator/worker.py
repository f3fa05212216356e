"""One worker: prompts in chunks, streams in steps, in one loop; messages in, messages out.

    Dispatch ──> prompts ──> head ──> pushing ──> (another worker's) waiting ──> adopting ──> batch
                              └───────── aggregated ──────────────────────────────────────────┘

Steps are not events. While the same streams run beside the same prompt, ``engine`` knows when the
k-th step ends, so there is one event for the next thing that changes this: a stream ends, the
prompt is computed or has a chunk to report, memory runs out.

A worker keeps the promises of the live one: a chunk's border is where a prompt yields, its blocks
stay as a cached prefix; when memory is short the latest streams are parked; reports follow what
changed. Simpler than live: blocks that streams share are counted for each, and what it takes from a
dispatch is not reported by itself, since the router counts what it sent.
"""

from collections import deque
from typing import assert_never

from pdserve.ids import RequestId
from pdserve.lifecycle import Event
from pdserve.messages import (
    Cancel,
    ChunkDone,
    Dispatch,
    FetchAhead,
    Goodbye,
    Handoff,
    Hello,
    Preempt,
    Resume,
    Role,
    WorkerFailed,
)
from pdserve.router.commands import WorkerMessage
from pdserve.simulator.attempt import Attempt, Stage
from pdserve.simulator.caches import BlockCache
from pdserve.simulator.engine import Engine
from pdserve.simulator.memory import Memory
from pdserve.simulator.reports import REPORT_NS_MAX, Reporter, Said, out_of_blocks, parked
from pdserve.simulator.settings import UNLIMITED_BLOCKS, SimulationSettings
from pdserve.simulator.stores import HostStore
from pdserve.simulator.surroundings import Surroundings


class Worker:
    def __init__(
        self,
        hello: Hello,
        settings: SimulationSettings,
        surroundings: Surroundings,
        store: HostStore | None,
        *,
        slow: float = 1.0,
    ) -> None:
        """``store``: of its host; None where it keeps nothing. ``slow``: times as slow."""
        self.hello = hello
        self.alive = True
        self.draining = False
        self.engine = Engine(settings, hello.block_tokens, slow=slow)
        self._batch = self.engine.batch
        self.cache = BlockCache(hello.block_count if hello.block_count < UNLIMITED_BLOCKS else None)
        self._settings = settings
        self._costs = settings.costs
        self._around = surroundings
        self._store = store
        prefills = hello.role is Role.PREFILL or settings.router.mode != "disaggregated"
        said = (self.cache, store) if prefills else (None, None)
        self._reporter = Reporter(hello, *said, tells_attained=settings.router.counts_tokens)
        self._held: dict[RequestId, Attempt] = {}
        self._prompts: deque[Attempt] = deque()
        self._waiting: deque[Attempt] = deque()
        self._adopting = 0
        self._memory = Memory(hello, settings.costs, self.cache, self._batch, store)
        self._version = 0  # of the plan; the events of older ones are void
        self._watched = False  # a regular report is scheduled
        # Bound once, since every binding is an object, and these are scheduled for every request.
        self._due, self._pushed, self._adopted = self._on_time, self._on_pushed, self._on_adopted

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def receive(self, now_ns: int, message: WorkerMessage) -> None:
        """From the router. It is never answered before this returns."""
        if not self.alive:
            return
        match message:
            case Dispatch():
                self._take_prompt(message, now_ns)
            case Preempt(request):
                attempt = self._held.get(request)
                if attempt is not None and attempt.may_stop(message):
                    self._preempt(attempt, now_ns)
            case Cancel(request):
                attempt = self._held.get(request)
                if attempt is not None and message.covers(attempt.number):
                    self._cancel(attempt, now_ns)
            case Resume(handoff):
                self._resume(handoff, now_ns)
            case FetchAhead(keys):
                self._around.at(now_ns + self._memory.ahead_ns(keys), self._memory.come_up, keys)
            case Goodbye():
                pass  # who drains is asked whether it is empty
            case _:
                assert_never(message)

    def _preempt(self, attempt: Attempt, now_ns: int) -> None:
        """Who is elsewhere in its life, or at its end by the next border, ignores it."""
        if attempt.stage is Stage.PROMPT:
            self._prompts.remove(attempt)
            self._leave(attempt)
            self._around.at(now_ns, self._say_preempted, attempt)
        elif attempt.stage is Stage.COMPUTING:
            self.engine.advance(now_ns)
            if attempt.computed_tokens < attempt.uncached_tokens:
                self._yield(attempt)
            self._plan()
        elif attempt.stage is Stage.RUNNING:
            self.engine.advance(now_ns)
            if attempt.finish_step > self._batch.steps:
                self._park(attempt)
            self._plan()

    def _cancel(self, attempt: Attempt, now_ns: int) -> None:
        self.engine.advance(now_ns)
        if attempt.stage in (Stage.PROMPT, Stage.COMPUTING):
            self._stop(attempt)
        elif attempt.stage is Stage.WAITING:
            self._waiting.remove(attempt)
        elif attempt.stage is Stage.RUNNING:
            self._drop_stream(attempt, now_ns)
        self._leave(attempt)
        self._refill(now_ns)
        self._plan()

    def die(self, now_ns: int) -> None:
        """With all that it holds. Clients keep what was sent by then."""
        self.engine.advance_before(now_ns)
        self.alive = False
        self._version += 1
        for attempt in self._held.values():
            if attempt.stage is Stage.RUNNING:
                self._drop_stream(attempt, now_ns)
                if attempt.generated >= attempt.job.target:
                    self._around.ended(attempt.job, now_ns)  # its last token was just out
            attempt.move_to(Stage.GONE)
        self._held.clear()

    def drain(self, now_ns: int) -> None:
        self.draining = True
        self._report(now_ns, Said())

    def become_slow(self, slow: float, now_ns: int) -> None:
        self.engine.advance(now_ns)
        self.engine.slow = slow
        self._plan()

    # ── prompts ──────────────────────────────────────────────────────────────────────────────────

    def _take_prompt(self, dispatch: Dispatch, now_ns: int) -> None:
        request = dispatch.request
        job = self._around.job(request.request)
        attempt = Attempt(job, request, dispatch.route, Stage.PROMPT)
        self._hold(attempt, now_ns)
        if not self._fits(attempt, now_ns):
            return
        restoring_ns = self._memory.restore(attempt, dispatch.cached_tokens, self.engine.slow)
        attempt.ready_ns = now_ns + restoring_ns  # it comes in while others compute
        attempt.ahead_of = dispatch.ahead_of
        self._line_up(attempt)
        if self._go_ahead(attempt, now_ns) or self._begin_next(now_ns):
            self._plan()

    def _line_up(self, attempt: Attempt) -> None:
        ahead_of = attempt.ahead_of
        if ahead_of is None:
            self._prompts.append(attempt)
            return
        places = (i for i, other in enumerate(self._prompts) if other.job.id == ahead_of)
        head = self.engine.head
        first = 0 if head is not None and head.job.id == ahead_of else len(self._prompts)
        self._prompts.insert(next(places, first), attempt)

    def _go_ahead(self, attempt: Attempt, now_ns: int) -> bool:
        """Pause the prompt under way for it; then a plan is due."""
        head = self.engine.head
        if head is None or attempt.ahead_of != head.job.id or self._prompts[0] is not attempt:
            return False
        if not self._memory.has_room(self._memory.blocks_for(attempt.tokens)):
            return False  # it would hold up the one that has its blocks
        self.engine.advance(now_ns)
        if attempt.ready_ns > self.engine.at_ns:
            self._around.at(attempt.ready_ns, self._on_restored, attempt)
        elif head.computed_tokens < head.uncached_tokens:
            if self._settings.chunk_reports_max and head.computed_tokens > head.reported_tokens:
                said = Said()
                said.note_all(head, now_ns=self.engine.at_ns)
                self._around.at(self.engine.at_ns, self._report, said)
            self.engine.head = None
            self._prompts.insert(1, head)
            self._begin_next(now_ns)
        return True

    def _begin_next(self, now_ns: int) -> bool:
        """Compute the first waiting prompt, if it is there and has room; then a plan is due."""
        if self.engine.head is not None or not self._prompts:
            return False
        attempt = self._prompts[0]
        if attempt.stage is Stage.COMPUTING:  # it let others go first
            self.engine.advance(now_ns)
            self._prompts.popleft()
            attempt.reported_ns = self.engine.at_ns
            self.engine.head = attempt
            return True
        keys = self._memory.cacheable(attempt)
        cached_blocks = self._memory.begun_blocks(attempt, keys)
        fresh_blocks = self._memory.blocks_for(attempt.tokens) - cached_blocks
        if not self._memory.has_room(fresh_blocks):
            return False
        if attempt.ready_ns > max(now_ns, self.engine.at_ns):
            self._around.at(attempt.ready_ns, self._on_restored, attempt)
            return False
        self.engine.advance(now_ns)
        self._prompts.popleft()
        attempt.move_to(Stage.COMPUTING)
        attempt.cached_tokens = cached_blocks * self.hello.block_tokens
        attempt.uncached_tokens = attempt.tokens - attempt.cached_tokens
        attempt.reported_ns = self.engine.at_ns
        if attempt.job.preempted_count == 0 and attempt.number == 0:
            attempt.job.cached_tokens = attempt.cached_tokens
        self.cache.touch(keys[:cached_blocks])
        self._memory.take(attempt, fresh_blocks)
        self.engine.head = attempt
        return True

    def _on_restored(self, now_ns: int, attempt: Attempt) -> None:
        if not self.alive or attempt.stage is not Stage.PROMPT:
            return
        if self._go_ahead(attempt, now_ns) or self._begin_next(now_ns):
            self._plan()

    def _yield(self, attempt: Attempt) -> None:
        """At the border where the state stands. It says so when its blocks are in the store."""
        self._stop(attempt)
        computed_tokens = attempt.cached_tokens + attempt.computed_tokens
        self._leave(attempt)
        self._memory.publish(attempt, computed_tokens)
        attempt.job.kept_blocks = computed_tokens // self.hello.block_tokens
        stored_ns = self.engine.at_ns
        if self._store is not None:
            stored_ns += self._costs.host_ns(computed_tokens)
        self._around.at(stored_ns, self._say_preempted, attempt)
        self._begin_next(self.engine.at_ns)

    def _stop(self, attempt: Attempt) -> None:
        """It is computed no further."""
        if self.engine.head is attempt:
            self.engine.head = None
        else:
            self._prompts.remove(attempt)

    def _say_preempted(self, now_ns: int, attempt: Attempt) -> None:
        said = Said()
        said.note(attempt, Event.PREEMPTED, attempt.cached_tokens + attempt.computed_tokens)
        attempt.job.preempted_count += attempt.computed_tokens > 0
        self._report(now_ns, said)

    # ── the end of a prompt ──────────────────────────────────────────────────────────────────────

    def _on_computed(self, attempt: Attempt, said: Said) -> None:
        self.engine.head = None
        self._memory.give_back(attempt)
        self._memory.publish(attempt, attempt.tokens)
        attempt.tokens += 1
        if attempt.generated >= attempt.job.target:
            self._end(attempt, said)
        elif attempt.decode == self.hello.worker:
            attempt.job.deliver(attempt.number, attempt.generated, self.engine.at_ns)
            said.note(attempt, Event.PREFILL_DONE)
            said.note(attempt, Event.ADOPTED)
            self._batch.join(attempt)
        else:
            attempt.move_to(Stage.PUSHING)
            pushed_ns = self.engine.at_ns + self._push_ns(attempt)
            self._around.at(pushed_ns, self._pushed, (attempt, said.chunks))
            said.chunks = []  # reported together with what follows in a moment

    def _push_ns(self, attempt: Attempt) -> int:
        """Chunks travel while the next ones are computed: what is left is the last one's."""
        tokens = (attempt.uncached_tokens - 1) % self._settings.chunk_tokens + 1
        return self._costs.handoff_ns(tokens)

    def _on_pushed(self, now_ns: int, pushed: tuple[Attempt, list[ChunkDone]]) -> None:
        attempt, chunks = pushed
        if not self.alive or attempt.stage is not Stage.PUSHING:
            return
        del self._held[attempt.request.request]
        said = Said()
        said.chunks = chunks
        said.note(attempt, Event.PREFILL_DONE)
        self._around.hand_off(attempt, now_ns)
        self._report(now_ns, said)

    # ── streams ──────────────────────────────────────────────────────────────────────────────────

    def take(self, now_ns: int, attempt: Attempt) -> None:
        """A hand-off from a prefill worker: its first token goes to the client at once."""
        attempt.job.deliver(attempt.number, attempt.generated, now_ns)
        attempt.move_to(Stage.WAITING)
        self._wait_for_room(attempt, now_ns)

    def _resume(self, handoff: Handoff, now_ns: int) -> None:
        request = handoff.request
        job = self._around.job(request.request)
        attempt = Attempt(job, request, handoff.route, Stage.WAITING)
        attempt.tokens = handoff.length
        if handoff.store != self.hello.store:
            attempt.ready_ns = now_ns + self._costs.handoff_ns(attempt.tokens)
        self._wait_for_room(attempt, now_ns)

    def _wait_for_room(self, attempt: Attempt, now_ns: int) -> None:
        self._hold(attempt, now_ns)
        if self._fits(attempt, now_ns):
            self._waiting.append(attempt)
            self._adopt_waiting(now_ns)

    def _adopt_waiting(self, now_ns: int) -> None:
        """Nobody overtakes. One is left for each that runs, or who comes would be parked first."""
        while self._waiting:
            attempt = self._waiting[0]
            blocks = self._memory.blocks_for(attempt.tokens)
            active = self._batch.count + self._adopting
            if active >= self.hello.running_max or not self._memory.has_room(blocks + active):
                return
            self._waiting.popleft()
            attempt.move_to(Stage.ADOPTING)
            self._adopting += 1
            self._memory.take(attempt, blocks)
            arrived_ns = max(now_ns, attempt.ready_ns) + self._costs.host_ns(attempt.tokens)
            self._around.at(arrived_ns, self._adopted, attempt)
            if self._batch.used_blocks_max(self.engine.planned) > self._memory.batch_blocks:
                self.engine.advance(now_ns)  # the streams may run out of memory sooner now
                self._plan()

    def _on_adopted(self, now_ns: int, attempt: Attempt) -> None:
        if not self.alive:
            return
        self._adopting -= 1
        self._memory.give_back(attempt)
        if attempt.stage is not Stage.ADOPTING:
            self._refill(now_ns)
            return
        self.engine.advance(now_ns)
        self._batch.join(attempt)
        self._plan()
        said = Said()
        said.note(attempt, Event.ADOPTED)
        self._report(now_ns, said)

    def _drop_stream(self, attempt: Attempt, now_ns: int) -> None:
        self._batch.leave(attempt)
        attempt.job.deliver(attempt.number, attempt.generated, now_ns)

    def _park(self, attempt: Attempt) -> None:
        """After the step at whose end the state stands."""
        self._drop_stream(attempt, self.engine.at_ns)
        attempt.move_to(Stage.PARKING)
        parked_ns = self.engine.at_ns + self._costs.host_ns(attempt.tokens)
        self._around.at(parked_ns, self._on_parked, attempt)

    def _on_parked(self, now_ns: int, attempt: Attempt) -> None:
        if not self.alive or attempt.stage is not Stage.PARKING:
            return
        attempt.job.parked_count += 1
        self._leave(attempt)
        self._refill(now_ns)
        self._around.say(self.hello.worker, parked(self.hello, attempt), now_ns)
        self._report(now_ns, Said())

    # ── steps ────────────────────────────────────────────────────────────────────────────────────

    def _plan(self) -> None:
        """Schedule the next thing that changes who takes part; what was scheduled is void."""
        self._version += 1
        when_ns = self.engine.plan(self._memory.batch_blocks)
        if when_ns is not None:
            self._around.at(when_ns, self._due, self._version)

    def _on_time(self, now_ns: int, version: int) -> None:
        if version != self._version or not self.alive:
            return
        head = self.engine.head
        said = Said()
        self.engine.complete()
        if head is not None:
            computed = head.computed_tokens >= head.uncached_tokens
            if computed or self._settings.chunk_reports_max:
                said.note_chunks(head, now_ns=now_ns)
            if computed:
                self._on_computed(head, said)
        if self._batch.count:
            for attempt in self._batch.take_ended():
                self._end(attempt, said)
            self._make_room()
        self._refill(now_ns)
        self._plan()
        if said.progress or said.chunks:
            self._report(now_ns, said)

    def _end(self, attempt: Attempt, said: Said) -> None:
        attempt.job.deliver(attempt.number, attempt.generated, self.engine.at_ns)
        said.note(attempt, Event.ENDED)
        self._leave(attempt)
        if attempt.number == attempt.job.attempt:
            self._around.ended(attempt.job, self.engine.at_ns)

    def _refill(self, now_ns: int) -> None:
        """Something may have left: who waits for room looks again."""
        if self._prompts and self._begin_next(now_ns):
            self._plan()
        if self._waiting:
            self._adopt_waiting(now_ns)

    # ── memory ───────────────────────────────────────────────────────────────────────────────────

    def _make_room(self) -> None:
        """Before the next step every stream has a place for its next token: the latest leave."""
        batch = self._batch
        while (
            batch.count
            and batch.used_blocks_max() > self._memory.batch_blocks < batch.used_blocks()
        ):
            if batch.count == 1 and self._memory.batch_blocks == self.hello.block_count:
                attempt, blocks = batch.latest(), batch.used_blocks()
                self._drop_stream(attempt, self.engine.at_ns)
                self._fail(attempt, blocks, self.engine.at_ns)
            else:
                self._park(batch.latest())

    # ── coming and going ─────────────────────────────────────────────────────────────────────────

    def _hold(self, attempt: Attempt, now_ns: int) -> None:
        """A later attempt replaces an earlier one that is still here."""
        earlier = self._held.get(attempt.request.request)
        if earlier is not None:
            self._cancel(earlier, now_ns)
        self._held[attempt.request.request] = attempt

    def _leave(self, attempt: Attempt) -> None:
        del self._held[attempt.request.request]
        if attempt.stage is not Stage.ADOPTING:  # its bytes keep coming until they are all there
            self._memory.give_back(attempt)
        attempt.move_to(Stage.GONE)

    def _fits(self, attempt: Attempt, now_ns: int) -> bool:
        """Whether it would, if it were alone; else it has failed."""
        blocks = self._memory.blocks_for(attempt.tokens)
        if blocks <= self.hello.block_count:
            return True
        self._fail(attempt, blocks, now_ns)
        return False

    def _fail(self, attempt: Attempt, blocks: int, now_ns: int) -> None:
        self._leave(attempt)
        failed = out_of_blocks(attempt, blocks, self.hello.block_count)
        self._around.at(now_ns, self._say_failed, failed)

    def _say_failed(self, now_ns: int, failed: WorkerFailed) -> None:
        self._around.say(self.hello.worker, failed, now_ns)

    # ── reports ──────────────────────────────────────────────────────────────────────────────────

    def _report(self, now_ns: int, said: Said) -> None:
        """The last thing to be done: the router answers at once."""
        if not self.alive:
            return
        report = self._reporter.report(
            now_ns,
            said,
            self._batch,
            draining=self.draining,
            running=self._batch.count + self._adopting + (self.engine.head is not None),
            waiting=len(self._waiting) + len(self._prompts),
            free_blocks=max(0, self._memory.batch_blocks - self._batch.used_blocks()),
        )
        if self._batch.count and not self._watched:
            self._watched = True
            self._around.at(now_ns + REPORT_NS_MAX, self._report_regularly, None)
        self._around.report(report, now_ns)

    def _report_regularly(self, now_ns: int, _: None) -> None:
        self._watched = False
        if not self.alive or not self._batch.count:
            return
        due_ns = self._reporter.reported_ns + REPORT_NS_MAX
        if due_ns > now_ns:
            self._watched = True
            self._around.at(due_ns, self._report_regularly, None)
            return
        self.engine.advance(now_ns)
        self._plan()
        self._report(now_ns, Said())
