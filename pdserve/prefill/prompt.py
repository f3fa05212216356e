"""One prompt at a prefill worker, and the stages it goes through.

    WAITING ──> RESTORING ──> COMPUTING ──> SEALING ──> GONE
       │            └────┬────────┘                      ^
       │                 └──> LEAVING ───────────────────┤
       └─────────────────────────────────────────────────┘ and there from each: cancel, failure;
                                                            from COMPUTING, what stays here
``GONE`` prompts are out of the loop's books, but moves they submitted may still answer; the answer
finds the stage and knows that nobody wants it any more.
"""

from dataclasses import dataclass, replace
from enum import StrEnum

from pdserve.clock import steady_unix_us
from pdserve.engine.outputs import ToDecode
from pdserve.engine.sequence import Sequence, stretch_us
from pdserve.errors import IllegalTransition
from pdserve.ids import BlockKey, TicketId, WorkerId
from pdserve.messages import Address, Handoff, Token
from pdserve.prefill.readings import Reading


class Stage(StrEnum):
    WAITING = "waiting"  # holds nothing
    RESTORING = "restoring"  # holds its blocks; the store's copies are on their way into them
    COMPUTING = "computing"
    SEALING = "sealing"  # the first token is drawn, the last blocks are on their way to decode
    LEAVING = "leaving"  # preempted, the computed blocks are on their way to the local store
    GONE = "gone"


_NEXT = {
    Stage.WAITING: {Stage.RESTORING, Stage.COMPUTING, Stage.GONE},
    Stage.RESTORING: {Stage.COMPUTING, Stage.LEAVING, Stage.GONE},
    Stage.COMPUTING: {Stage.SEALING, Stage.LEAVING, Stage.GONE},
    Stage.SEALING: {Stage.GONE},
    Stage.LEAVING: {Stage.GONE},
    Stage.GONE: set[Stage](),
}


@dataclass(slots=True, eq=False)
class Prompt:
    sequence: Sequence
    store: Address  # where its blocks go
    cached_tokens: int | None = None  # that its host has, as far as the router knows
    stays: bool = False  # nothing to hand over, so no ticket: it is decoded here too, or not at all
    reading: Reading | None = None  # nothing is generated: what its client wants is this
    stage: Stage = Stage.WAITING
    ticket: TicketId | None = None
    ticket_tries: int = 0  # left, to get slots at the store
    pushed_blocks: int = 0  # or on their way
    pushing: bool = False  # one push at a time: the next takes everything computed meanwhile
    computed_tokens: int = 0  # by this worker, cached ones not counted
    first_token: Token | None = None

    def move_to(self, stage: Stage) -> None:
        if stage not in _NEXT[self.stage]:
            raise IllegalTransition(f"{self.sequence.id}: {stage} while {self.stage}")
        self.stage = stage

    @property
    def remaining_tokens(self) -> int:
        return len(self.sequence.tokens) - self.sequence.kv_count

    @property
    def grows(self) -> bool:
        """Whether it is begun, and will need more blocks here."""
        begun = self.stage in (Stage.RESTORING, Stage.COMPUTING)
        return begun and self.stays and self.reading is None

    @property
    def cacheable(self) -> tuple[BlockKey, ...]:
        """Keys of the blocks that need not be computed. The last token always is: its logits are
        what the first token is drawn from."""
        sequence = self.sequence
        most = len(sequence.tokens) - 1
        if self.reading is not None:
            most = min(most, self.reading.reads_from)
        return sequence.keys(most // sequence.table.block_tokens)

    def note_computed(self, worker: WorkerId) -> None:
        """All of it is: what that took, and what of it was found."""
        sequence, now_us = self.sequence, steady_unix_us()
        timing = sequence.timing
        cached = timing.cached_tokens
        if timing.preempted_count == 0:  # else what it finds cached is mostly its own work
            cached = min(
                len(sequence.tokens) - self.computed_tokens, sequence.request.prompt_tokens
            )
        sequence.timing = replace(
            timing,
            prefill_us=timing.prefill_us + stretch_us(timing, now_us),
            since_unix_us=now_us,
            cached_tokens=cached,
            prefill=worker,
        )

    def handoff(self) -> ToDecode:
        """What decode is to be told, once all blocks are sealed under the ticket."""
        sequence = self.sequence
        assert self.ticket is not None
        assert self.first_token is not None
        handoff = Handoff(
            request=sequence.request,
            route=sequence.route,
            ticket=self.ticket,
            store=self.store,
            tokens=tuple(sequence.tokens),
            block_keys=sequence.keys(sequence.full_blocks),
            unsent=(self.first_token,),
            timing=sequence.timing,
            namespace=sequence.namespace.hex(),
        )
        return ToDecode(sequence.route.decode_address, handoff)
