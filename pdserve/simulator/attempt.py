"""A request in the simulation, and one attempt at it as workers hold it.

    PROMPT ──> COMPUTING ──> PUSHING ──> WAITING ──> ADOPTING ──> RUNNING ──> PARKING
                   └─────────────── aggregated ─────────────────────┘

and from each to GONE: the last token, a preemption, a cancel, a failure, the worker's death. What
is under way for an attempt that is GONE concerns nobody when it arrives. A parked attempt is GONE
too: what resumes is another ``Attempt`` of the same number, made from its hand-off.
"""

from enum import StrEnum
from typing import Any, Final

from pdserve.errors import IllegalTransition
from pdserve.ids import RequestId
from pdserve.lifecycle import Phase
from pdserve.messages import Preempt, Request, Route
from pdserve.simulator.caches import Blocks
from pdserve.simulator.traces import TraceRequest


class Stage(StrEnum):
    __hash__ = str.__hash__  # that of ``Enum`` is interpreted

    PROMPT = "prompt"  # at a prefill worker, behind others
    COMPUTING = "computing"  # perhaps paused, while others go first
    PUSHING = "pushing"  # computed; the last of its blocks are on their way to decode's store
    WAITING = "waiting"  # at a decode worker that has no room yet
    ADOPTING = "adopting"  # its blocks are on their way in
    RUNNING = "running"  # one of the streams
    PARKING = "parking"  # its blocks are on their way out
    GONE = "gone"


KEYS_MAX: Final = 1 << 20
"""Blocks whose objects are remembered, and as many from before."""

_NEXT = {
    Stage.PROMPT: {Stage.COMPUTING, Stage.GONE},
    Stage.COMPUTING: {Stage.PUSHING, Stage.RUNNING, Stage.GONE},
    Stage.PUSHING: {Stage.WAITING, Stage.GONE},
    Stage.WAITING: {Stage.ADOPTING, Stage.GONE},
    Stage.ADOPTING: {Stage.RUNNING, Stage.GONE},
    Stage.RUNNING: {Stage.PARKING, Stage.GONE},
    Stage.PARKING: {Stage.GONE},
    Stage.GONE: set[Stage](),
}


class Outcome(StrEnum):
    OPEN = "open"
    FINISHED = "finished"
    REFUSED = "refused"


class Job:
    """One request: what the trace says, and what became of it."""

    __slots__ = ("asked_ns", "attempt", "cached_tokens", "delivered", "end_ns", "factor",
                 "first_ns", "id", "index", "kept_blocks", "keys", "level", "outcome",
                 "parked_count", "preempted_count", "retries", "target", "trace")  # fmt: skip

    def __init__(
        self,
        index: int,
        trace: TraceRequest,
        keys: Blocks,
        *,
        target: int,
        factor: float,
    ) -> None:
        self.index = index
        self.id = RequestId(f"r{index}")
        self.trace = trace
        self.keys = keys
        self.target = target  # tokens it generates in all
        self.factor = factor  # of its prefill's time, over the prediction
        self.attempt = 0
        self.asked_ns = 0  # the last time, where it asked again
        self.retries = 0  # so often its client has asked again
        self.delivered = 0  # generated tokens that the client has
        self.first_ns = self.end_ns = -1
        self.level = -1
        self.kept_blocks = 0  # computed before it was preempted; for traces without block ids
        self.cached_tokens = self.preempted_count = self.parked_count = 0
        self.outcome = Outcome.OPEN

    def deliver(self, attempt: int, generated: int, now_ns: int) -> None:
        """The client has so many tokens now, if this is the attempt it listens to."""
        if attempt != self.attempt or generated <= self.delivered:
            return
        self.delivered = generated
        if self.first_ns < 0:
            self.first_ns = now_ns


class Attempt:
    """One attempt of a job at one worker, or on its way between two."""

    __slots__ = ("ahead_of", "base_tokens", "blocks", "cached_tokens", "chunk_ns",
                 "chunk_tokens", "computed_tokens", "decode", "finish_step", "job", "number",
                 "prefill", "ready_ns", "reported_ns", "reported_tokens", "request",
                 "restored_blocks", "stage", "tokens", "uncached_tokens")  # fmt: skip

    def __init__(self, job: Job, request: Request, route: Route, stage: Stage) -> None:
        self.job = job
        self.request = request
        self.number = request.attempt
        self.prefill = route.prefill
        self.decode = route.decode
        self.stage = stage
        self.tokens = request.length  # prompt and generated, when it last changed hands
        self.blocks = 0  # of device memory that it holds
        self.restored_blocks = 0  # leading ones that the host's store has for it
        self.ready_ns = 0  # when those are there
        self.ahead_of: RequestId | None = None  # a prompt that lets it go first
        self.cached_tokens = self.uncached_tokens = self.computed_tokens = 0  # of its prefill
        self.reported_tokens = self.reported_ns = 0  # of the computed ones, and when
        self.chunk_ns = self.chunk_tokens = 0  # when its last chunk began, computed by then
        self.finish_step = 0  # of its worker's steps, the one that draws its last token
        self.base_tokens = 0  # its tokens, less its worker's steps, while it runs

    def move_to(self, stage: Stage) -> None:
        if stage not in _NEXT[self.stage]:
            raise IllegalTransition(f"{self.job.id}: {stage} while {self.stage}")
        self.stage = stage

    def may_stop(self, preempt: Preempt) -> bool:
        """Whether it is what was meant, and still where it was then."""
        decodes = self.stage is Stage.RUNNING
        return self.number == preempt.attempt and decodes == (preempt.phase is Phase.DECODING)

    @property
    def generated(self) -> int:
        return self.tokens - self.request.prompt_tokens


class Keys:
    """The numbers of blocks, in the place of their keys: nobody in router or simulator looks into a
    key, and numbers that follow one another lie side by side in a map, where hashes lie anywhere.

    One object per number, for all requests, so that most are compared by identity. Blocks that
    nobody had for long get another object, which is equal: only time is lost by it.
    """

    __slots__ = ("_before", "_known")

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}  # Any: an ``int`` would be unpacked, and made anew
        self._before: dict[Any, Any] = {}  # when there were ``KEYS_MAX`` of them

    def of(self, blocks: Blocks) -> Blocks:
        known, before = self._known, self._before
        for block in blocks:
            if block not in known:
                known[block] = before.get(block, block)
        keys = tuple([known[block] for block in blocks])
        if len(known) > KEYS_MAX:
            self._known, self._before = {}, known
        return keys
