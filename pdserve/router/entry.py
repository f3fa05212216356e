"""One live attempt of one request, as the router knows it. ``state`` moves it; orders rank it."""

from collections.abc import Hashable
from dataclasses import dataclass

from pdserve.ids import WorkerId
from pdserve.lifecycle import Phase
from pdserve.messages import Decision, Handoff, Request
from pdserve.router.prefix_index import Hits


class ShadowJob:
    """A prefill as the shadows of ``goals`` imitate it. Its work is kept up to date while it waits
    in the real queue; what a shadow has served by then stays served."""

    __slots__ = ("arrived_ns", "work_ns")

    def __init__(self, arrived_ns: int, work_ns: int) -> None:
        self.arrived_ns = arrived_ns
        self.work_ns = work_ns


class Entry:
    """No dataclass, for the reason of ``placement.Choice``. All begin with the figures here."""

    phase: Phase = Phase.QUEUED
    level: int = 0
    rung: int = 0  # of it, with ``skip_join``
    virtual_ns: int = 0  # its arrival, as its class counts it; written by the order
    work_ns: int = 0  # predicted prefill time of what is left, when it was last queued or reported
    uncached_tokens: int = 0  # of which that is the time
    computed_tokens: int = 0  # by chunk reports: KV exists for so many
    cached_tokens: int = 0  # predicted for the prefill worker that holds it
    begun: bool = False  # since its last dispatch, as far as is known
    dispatched_ns: int = 0
    vouched_by: tuple[WorkerId, ...] = ()  # who said that it has it, since it was last sent out
    queued_us: int = 0  # all waits together
    prefill_us: int = 0  # all stretches that were preempted, together
    preempted_count: int = 0
    parked_count: int = 0
    passed_over: int = 0  # later ones were dispatched before it because it fitted nowhere
    deferred_ns: int | None = None  # since when it waits for a better worker than a free one
    preempting: bool = False  # a Preempt is on its way
    hits: Hits | None = None  # while it waits: who has how much of it, by that version of the index
    hits_version: int = -1
    stored_blocks: int = 0  # by that version: leading ones that workers of other hosts may fetch
    watched: Hashable | None = None  # while it waits: the next block that nobody has
    shadow_job: ShadowJob | None = None  # where shadows keep it waiting
    bound_to: WorkerId | None = None  # chosen on arrival, where placement is not late
    prefill: WorkerId | None = None
    prefilled_by: WorkerId | None = None  # which may yet fail to hand it over
    decode: WorkerId | None = None
    reserved_blocks: int = 0
    context_tokens: int = 0  # counted at its decode worker
    adopted_ns: int = 0
    generated_tokens: int = 0  # by reports; of all attempts together
    handoff: Handoff | None = None  # while parked
    resumed: Handoff | None = None  # after that, until decode has adopted it
    decisions: tuple[Decision, ...] = ()

    def __init__(
        self,
        request: Request,
        *,
        order: int,
        arrived_ns: int,
        deadline_ns: int,
        queued_at_ns: int,
    ) -> None:
        self.request = request
        self.id = request.request
        self.total_tokens = request.length  # prompt and what was delivered: what is prefilled
        self.order = order  # of arrival: who came first at equal times
        self.arrived_ns = arrived_ns  # kept through preemptions
        self.deadline_ns = deadline_ns
        self.queued_at_ns = queued_at_ns  # when the wait now running began

    @property
    def beam_blocks(self) -> int:
        """Blocks that a beam search takes beside those of its prompt as soon as it is decoded: each
        beam begins one of its own."""
        return self.request.width if self.request.beams else 0

    @property
    def uncomputed_tokens(self) -> int:
        """Of its prefill; at least 1, because the last token is always computed."""
        return max(1, self.total_tokens - max(self.computed_tokens, self.cached_tokens))


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """A parked request's ticket that ``worker`` was sent and has not said to have adopted; the
    request itself has ended, or has another attempt."""

    handoff: Handoff
    worker: WorkerId
    at_ns: int
