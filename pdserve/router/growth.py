"""How much KV the streams of a decode worker will come to hold: what is left for a new one.

A worker that takes streams as long as blocks are free takes too many: all of them grow, and the
last ones are parked for the others. One that keeps free what each might need at most stands half
empty. In between is the *predicted peak*: the most that they hold at once if each ends when answers
of its class are expected to end, as ``lengths`` has learned. A new stream is taken if it stays
below the pool with it.

Leading blocks that streams share are held once: what their contexts add up to beyond the blocks in
use is taken off each in proportion.

Source: "Past-Future" (Gong et al., ASPLOS 2025), with expected instead of sampled lengths.
"""

from collections.abc import Mapping

from pdserve.ids import RequestId
from pdserve.router.entry import Entry
from pdserve.router.lengths import LengthModel, class_of, peak_tokens
from pdserve.router.worker import Worker

PEAK_SHARE_MAX = 0.95
"""Of a pool that the predicted peak may take."""

FEW_RATIO = 2.0
"""Where all would fit if each grew so many times longer than the mean answer, nobody computes."""


class Growth:
    def __init__(self, entries: Mapping[RequestId, Entry]) -> None:
        """``entries``: of every request in anybody's streams."""
        self._lengths = LengthModel()
        self._entries = entries

    def finished(self, entry: Entry) -> None:
        """Its answer has ended with so many tokens."""
        self._lengths.observe(class_of(entry.request), entry.generated_tokens)

    def room_blocks(self, worker: Worker) -> int:
        """Blocks that a new stream may take; at most those that are free."""
        room_blocks = worker.room_blocks
        if room_blocks <= 0 or not worker.streams:
            return room_blocks
        block_tokens = worker.hello.block_tokens
        pool_tokens = worker.hello.block_count * block_tokens
        mean_tokens = self._lengths.remaining(None, 0)
        grown_tokens = FEW_RATIO * mean_tokens * (len(worker.streams) + 1)
        if worker.context_tokens + grown_tokens <= pool_tokens:
            return room_blocks
        free_tokens = (worker.free_blocks - worker.reserved_blocks) * block_tokens
        share = min(1.0, (pool_tokens - free_tokens) / max(1, worker.context_tokens))
        live = [(mean_tokens, 0)]
        for request in worker.streams:
            entry = self._entries[request]
            live.append((self._remaining_tokens(entry), round(share * entry.context_tokens)))
        left_tokens = int(PEAK_SHARE_MAX * pool_tokens) - peak_tokens(live)
        return min(room_blocks, max(0, left_tokens // block_tokens))

    def _remaining_tokens(self, entry: Entry) -> float:
        left_tokens = entry.request.stop.max_tokens - entry.generated_tokens
        expected_tokens = self._lengths.remaining(class_of(entry.request), entry.generated_tokens)
        return max(1.0, min(left_tokens, expected_tokens))
