"""What runs on one worker: a batch of streams and at most one prompt, step by step, in closed form.

The state always stands at the end of a step, never in the middle of one. What comes from outside
counts at the end of the step under way, as in a live loop, so the state may stand in the future.
"""

from collections.abc import Callable
from typing import Final

from pdserve.simulator.attempt import Attempt
from pdserve.simulator.batch import Batch
from pdserve.simulator.chunks import Chunks
from pdserve.simulator.pace import Pace
from pdserve.simulator.reports import REPORT_NS_MAX
from pdserve.simulator.settings import SimulationSettings

_NEVER: Final = 1 << 62


class Engine:
    """Whoever changes batch or head calls ``advance`` before and ``plan`` after."""

    __slots__ = ("_alone", "_beside", "_chunks", "_costs", "_members", "_origin_ns", "_pace",
                 "_passed", "_planned_ns", "_preempts", "_settings", "at_ns", "batch", "busy_ns",
                 "head", "on_turn", "planned", "slow", "tokens_computed", "works")  # fmt: skip

    def __init__(self, settings: SimulationSettings, block_tokens: int, *, slow: float) -> None:
        """``slow``: how many times as long as it should everything takes."""
        self.slow = slow
        self.works = False  # as of the last plan
        self.on_turn: Callable[[int], None] | None = None  # called when ``works`` has changed
        self.head: Attempt | None = None  # the prompt under way
        self.batch = Batch(block_tokens)
        self.at_ns = 0  # where the state stands
        self.busy_ns = 0
        self.tokens_computed = 0
        self.planned = 0  # steps from there until what was planned
        self._planned_ns = 0  # when that is
        self._members: tuple[Attempt | None, int, float] | None = None  # that the pace is of
        self._origin_ns = 0  # where it begins
        self._passed = 0  # steps from the origin to where the state stands
        self._preempts = settings.router.preemption and settings.router.policy != "fcfs"
        self._costs = settings.costs
        self._settings = settings
        self._alone = self._beside = self._chunks = Chunks(settings.chunk_tokens)
        if settings.mixed_chunk_tokens is not None:
            self._beside = Chunks(settings.mixed_chunk_tokens, settings.double_cost_tokens)
        self._pace = self._new_pace()

    def advance(self, now_ns: int) -> None:
        """To the end of the step under way at ``now_ns``."""
        if now_ns <= self.at_ns:
            return
        if self.head is None and not self.batch.count:
            self.at_ns = now_ns
        else:
            self._pass(self._steps_until(now_ns))

    def advance_before(self, now_ns: int) -> None:
        """To the end of the last step that was over at ``now_ns``: the next one will never be."""
        if self.planned and now_ns > self.at_ns:
            self.planned += 1  # what would have come after the plan is never asked for
            self._pass(max(0, self._steps_until(now_ns + 1) - 1))

    def complete(self) -> None:
        """To the end of what was planned."""
        steps, head = self.planned, self.head
        if head is not None and steps == 1:
            head.chunk_ns, head.chunk_tokens = self.at_ns, head.computed_tokens
        elif head is not None and steps:
            before_last = self._pace.elapsed_ns(self._passed + steps - 1)
            head.chunk_ns = self._origin_ns + round(before_last)
            head.chunk_tokens = self._pace.computed_after(self._passed + steps - 1)
        self._pass(steps, self._planned_ns)

    def _steps_until(self, now_ns: int) -> int:
        end = self._passed + self.planned
        return self._pace.steps_until(now_ns - self._origin_ns, self._passed, end) - self._passed

    def _pass(self, steps: int, at_ns: int | None = None) -> None:
        """``at_ns``: when they are over, where that is known."""
        self._passed += steps
        if at_ns is None:
            at_ns = self._origin_ns + round(self._pace.elapsed_ns(self._passed))
        self.busy_ns += at_ns - self.at_ns
        self.at_ns = at_ns
        head = self.head
        if head is not None:
            computed = self._pace.computed_after(self._passed)
            self.tokens_computed += computed - head.computed_tokens
            head.computed_tokens = computed
        self.batch.pass_steps(steps)
        self.planned = 0

    def plan(self, batch_blocks: int) -> int | None:
        """When who takes part changes next, or a chunk is to be reported; None: never.

        ``batch_blocks``: what the streams may grow into.
        """
        head, batch = self.head, self.batch
        works = head is not None or batch.count > 0
        if works != self.works:
            self.works = works
            if self.on_turn is not None:
                self.on_turn(self.at_ns)
        if not works:
            self.planned = 0
            return None
        members = (head, batch.changes, self.slow)
        if self._members != members:
            self._members = members
            self._pace = self._new_pace()
            self._origin_ns, self._passed = self.at_ns, 0
        steps = _NEVER if head is None else self._steps_of_prompt(head)
        if batch.count:
            steps = batch.steps_within(batch_blocks, min(steps, batch.steps_to_end()))
        elapsed_ns = self._pace.elapsed_ns(self._passed + steps)
        if head is not None and self._settings.chunk_reports_max:
            due_ns = head.reported_ns + REPORT_NS_MAX - self._origin_ns
            if elapsed_ns > due_ns:
                first, last = self._passed + 1, self._passed + steps
                steps = self._pace.steps_until(due_ns, first, last) - self._passed
                elapsed_ns = self._pace.elapsed_ns(self._passed + steps)
        self.planned = steps
        self._planned_ns = self._origin_ns + round(elapsed_ns)
        return self._planned_ns

    def _new_pace(self) -> Pace:
        head, batch = self.head, self.batch
        self._chunks = self._beside if batch.count else self._alone
        pace = Pace(
            self._costs.decode,
            streams=batch.count,
            context_tokens=batch.context_tokens,
            slow=self.slow,
        )
        if head is not None:
            beside = 1 - self._settings.overlap if batch.count else 1.0
            pace.add_prompt(
                self._costs.prefill,
                uncached_tokens=head.uncached_tokens,
                cached_tokens=head.cached_tokens,
                computed_tokens=head.computed_tokens,
                chunks=self._chunks,
                slow=self.slow * head.job.factor * beside,
            )
        return pace

    def _steps_of_prompt(self, head: Attempt) -> int:
        """Until it is computed, or has a chunk to report by count, for which ``plan`` may not wait:
        every so many where somebody may preempt it, and the last but one, after which the router
        may send the next prompt."""
        reports, passed = self._settings.chunk_reports_max, self._passed
        left = self._pace.steps_to(head.uncached_tokens) - passed
        if not reports or left <= 1:
            return left
        if not self._preempts:
            return left - 1
        chunks, first = self._chunks, head.cached_tokens
        whole = chunks.steps(first, first + head.uncached_tokens)
        stride = -(-whole // (reports + 1))  # ceil: from one report to the next
        due = chunks.after(first + head.reported_tokens, stride) - first
        return min(left - 1, max(1, self._pace.steps_to(due) - passed))
