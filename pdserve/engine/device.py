"""A worker's device pool and the moves under way from and to it.

Blocks that a move touches are held by the move as well as by the sequence, from submission until
its answer is collected. So a sequence can be let go at any moment, a cancel in the middle of a
push included, and its blocks come back when the last of the two is done with them.
"""

from collections import Counter

from pdserve.engine.blocks import BlockPool
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Move, Moved, blocks_touched
from pdserve.engine.outputs import Load
from pdserve.messages import Attained


class Device:
    def __init__(self, block_count: int, mover: Mover) -> None:
        self.pool = BlockPool(block_count)
        self.mover = mover
        self.counters: Counter[str] = Counter()

    def submit(self, move: Move, owner: object = None) -> None:
        self.pool.share(blocks_touched(move))
        self.mover.submit(move, owner)

    def offer(self, move: Move) -> None:
        """For what only makes a later request cheaper: dropped and counted under pressure."""
        self.pool.share(blocks_touched(move))
        if not self.mover.offer(move):
            self._drop(move)

    def collect(self) -> list[Moved]:
        moved = self.mover.collect()
        for answer in moved:
            self.pool.release(blocks_touched(answer.move))
        return moved

    def room(self, block_count: int) -> bool:
        """Whether ``block_count`` blocks can be taken now; drops what was offered if that helps."""
        if self.pool.free_count < block_count:
            for move in self.mover.take_back_offered():
                self._drop(move)
        return self.pool.free_count >= block_count

    def load(self, *, running: int, waiting: int, attained: tuple[Attained, ...] = ()) -> Load:
        """What the pool has to say beside a loop's own numbers; takes its changes of keys."""
        added, removed = self.pool.take_changes()
        return Load(
            running=running,
            waiting=waiting,
            free_blocks=self.pool.free_count,
            blocks_added=added,
            blocks_removed=removed,
            attained=attained,
            # The loop's own and those of the store clients; their names differ.
            counters=self.mover.counters() | dict(self.counters),
        )

    def _drop(self, move: Move) -> None:
        self.pool.release(blocks_touched(move))
        self.counters["offers_dropped"] += 1
