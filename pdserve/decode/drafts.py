"""The drafts of a worker's streams: what a step computes of each beyond its next token.

Without speculation there are none, and nothing here does anything.
"""

from collections import Counter
from collections.abc import Sequence

from pdserve.decode.speculation import Drafting, Speculation
from pdserve.decode.stream import Stream
from pdserve.engine.blocks import BlockPool
from pdserve.engine.loop import StepTime
from pdserve.messages import Token


class Drafts:
    def __init__(
        self,
        speculation: Speculation | None,
        pool: BlockPool,
        counters: Counter[str],
        *,
        block_tokens: int,
    ) -> None:
        self._speculation = speculation
        self._pool = pool
        self._counters = counters
        self._block_tokens = block_tokens

    @property
    def are_made(self) -> bool:
        return self._speculation is not None

    def of(self, streams: Sequence[Stream], growing: int) -> list[list[int]]:
        """Those of each stream; their blocks are taken. ``growing``: how many sequences go on."""
        if self._speculation is None:
            return [[] for _ in streams]
        # Who grows finds a block in the next step: no draft has somebody parked for it.
        spare = max(0, self._pool.free_count - growing)
        rooms = [self._room_tokens(stream, spare) for stream in streams]
        texts = [
            (_drafting(stream, self._speculation), stream.sequence.tokens) for stream in streams
        ]
        chosen = self._speculation.choose(texts, rooms)
        for stream, drafts in zip(streams, chosen, strict=True):
            del drafts[self._room_tokens(stream, spare) :]
            if (guide := stream.sequence.guide) is not None:
                del drafts[guide.fitting(drafts) :]  # the others are never drawn
            table = stream.sequence.table
            missing = max(0, table.blocks_needed(len(stream.sequence.tokens) + len(drafts)))
            table.blocks.extend(self._pool.take(missing))
            spare -= missing
        return chosen

    def took(self, rows: int, time: StepTime) -> None:
        """A step of so many rows was computed."""
        if self._speculation is not None and not time.shared:
            self._speculation.took(rows, time.elapsed_us)

    def came(self, stream: Stream, drafts: Sequence[int], tokens: Sequence[Token]) -> None:
        """What was drawn of a stream, up to the first that was not its draft."""
        self._counters["tokens_drafted"] += len(drafts)
        self._counters["tokens_accepted"] += sum(
            token.token == draft for token, draft in zip(tokens, drafts, strict=False)
        )
        if self._speculation is not None and stream.drafting is not None:
            self._speculation.came(stream.drafting, [token.token for token in tokens])

    def end(self, stream: Stream) -> None:
        """It leaves this worker, or its blocks: it has no drafts any more."""
        if stream.drafting is not None:
            stream.drafting.drafter.end()
            stream.drafting = None

    def _room_tokens(self, stream: Stream, spare_blocks: int) -> int:
        """How many drafts there is room for, in KV blocks and before the last token."""
        sequence = stream.sequence
        block_count = len(sequence.blocks) + spare_blocks
        return min(
            block_count * self._block_tokens - len(sequence.tokens), sequence.tokens_left - 1
        )


def _drafting(stream: Stream, speculation: Speculation) -> Drafting:
    if stream.drafting is None:
        stream.drafting = speculation.begin()
    return stream.drafting
