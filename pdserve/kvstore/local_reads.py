"""Claiming without asking: a client on the node's host finds and pins blocks by itself.

    candidates from the index  ->  on the board  ->  mark and key confirm them  ->  a claim

What cannot be had this way the node is asked for: a candidate that was refuted (somebody else's
block came in between), a board that is full, a prefix that ends here where a tier below may know
more. Nothing here waits or tries again.

The node still has to learn what prompts ask for: its order of eviction and the tier below live on
that. It is told with the next release, or before the next question, without waiting for it; what
it does not take then is dropped.
"""

from collections.abc import Callable, Sequence

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore import protocol
from pdserve.kvstore.answers import ClaimGrant
from pdserve.kvstore.hazards import ReaderBoard, Run
from pdserve.kvstore.shared_index import IndexReader

ASKED_MAX = 16
"""Prompts that the node is told of in one message."""

ASKED_BYTES_MAX = 1 << 20
"""Of their keys; a message holds the keys of one prompt more."""

NOTHING = ClaimGrant(0, (), (), has_tail=False)


class LocalReads:
    """For one thread at a time."""

    def __init__(
        self,
        index: IndexReader,
        board: ReaderBoard,
        post: Callable[[object], bool],
        *,
        has_lower_tier: bool,
    ) -> None:
        """``post`` sends a message that is not answered."""
        self._index = index
        self._board = board
        self._post = post
        self._has_lower_tier = has_lower_tier
        self._asked: list[bytes] = []
        self._asked_bytes = 0

    def claim(self, keys: Sequence[BlockKey]) -> tuple[ClaimGrant, Run] | None:
        """The longest stored prefix, pinned here; None when the node has to be asked."""
        joined = b"".join(keys)
        if not keys or len(joined) != len(keys) * BLOCK_KEY_BYTES:
            return None  # the node says what is wrong with them
        slots = self._index.lookup(joined)
        count = len(slots)
        if count < len(keys) and (self._has_lower_tier or self._index.unlisted_count):
            return None
        if count == 0:
            self._note(joined)
            return NOTHING, Run(0, 0)
        run = self._board.pin(slots)
        if run is None:
            return None
        generations = self._index.confirm(slots, joined)
        if generations is None:
            self._board.unpin(run)
            return None
        self._note(joined)
        grant = ClaimGrant(0, tuple(slots.tolist()), tuple(generations.tolist()), has_tail=False)
        return grant, run

    def release(self, run: Run) -> None:
        """Idempotent."""
        if run.count:
            self._board.unpin(run)
            # The node may have waited for just this, so it is told in any case.
            self._tell()

    def tell_asked(self) -> None:
        """Before the node is asked something: it shall know what came before."""
        if self._asked:
            self._tell()

    def _note(self, joined: bytes) -> None:
        self._asked.append(joined)
        self._asked_bytes += len(joined)
        if len(self._asked) >= ASKED_MAX or self._asked_bytes > ASKED_BYTES_MAX:
            self._tell()

    def _tell(self) -> None:
        asked, self._asked, self._asked_bytes = tuple(self._asked), [], 0
        self._post(protocol.Released(asked))
