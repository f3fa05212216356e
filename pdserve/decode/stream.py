"""One sequence at a decode worker, and the stages it goes through.

    WAITING ──> ADOPTING ──> RUNNING ──> PARKING ──> GONE
                             ^ kept: its prompt was computed here

and from each to GONE: the last token, a cancel, a failure. What a GONE stream still has under way
comes back to nobody, and is cleaned up where it arrives.
"""

from dataclasses import dataclass
from enum import StrEnum

from pdserve.decode.beam_group import BeamGroup
from pdserve.decode.speculation import Drafting
from pdserve.engine.sequence import Sequence
from pdserve.errors import IllegalTransition
from pdserve.ids import BlockId, BlockKey
from pdserve.messages import Handoff


class Stage(StrEnum):
    WAITING = "waiting"  # its blocks are in the store, under the hand-off's ticket
    ADOPTING = "adopting"  # holds device blocks; their bytes are on their way
    RUNNING = "running"
    PARKING = "parking"  # its bytes are on their way to the store
    GONE = "gone"


_NEXT = {
    Stage.WAITING: {Stage.ADOPTING, Stage.GONE},
    Stage.ADOPTING: {Stage.RUNNING, Stage.GONE},
    Stage.RUNNING: {Stage.PARKING, Stage.GONE},
    Stage.PARKING: {Stage.GONE},
    Stage.GONE: set[Stage](),
}


@dataclass(slots=True, eq=False)
class Stream:
    sequence: Sequence  # of a beam search the root
    handoff: Handoff | None  # None: kept, it came over no store
    stage: Stage = Stage.WAITING
    leaving_blocks: int = 0  # while PARKING: what its leaving will free
    drafting: Drafting | None = None  # from its first step on, where there is speculation
    group: BeamGroup | None = None  # of a beam search

    @property
    def keys(self) -> tuple[BlockKey, ...]:
        """Of the full blocks that the hand-off brings."""
        return self.handoff.block_keys if self.handoff else ()

    @property
    def width(self) -> int:
        """Sequences that it stands for."""
        return self.sequence.request.width

    @property
    def sequences(self) -> list[Sequence]:
        """Whoever holds blocks for it."""
        return [self.sequence, *(self.group.beams if self.group else ())]

    @property
    def blocks(self) -> list[BlockId]:
        """Each as often as it is held."""
        return [block for sequence in self.sequences for block in sequence.blocks]

    @property
    def missing_blocks(self) -> int:
        """Blocks to be taken before the next step, once it runs."""
        if self.group is not None:
            return self.group.missing_blocks
        return max(0, self.sequence.table.blocks_needed(len(self.sequence.tokens)))

    @property
    def first_blocks(self) -> int:
        """What it takes for its first step beside the blocks of its tokens."""
        return self.width if self.group is not None else 0

    @property
    def generated_count(self) -> int:
        group = self.group
        return group.search.generated_count if group else self.sequence.generated_count

    def move_to(self, stage: Stage) -> None:
        if stage not in _NEXT[self.stage]:
            raise IllegalTransition(f"{self.sequence.id}: {stage} while {self.stage}")
        self.stage = stage
