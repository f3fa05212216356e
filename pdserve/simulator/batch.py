"""The streams of one worker: who runs, how much memory they take, and who ends next.

All streams gain one token per step, so what each has is its *base* plus the worker's steps, and
nothing needs to be touched while steps pass.
"""

import heapq
from collections.abc import Iterator

from pdserve.ids import RequestId
from pdserve.simulator.attempt import Attempt, Stage


class Batch:
    __slots__ = ("_block_tokens", "_finishes", "_streams", "changes", "context_tokens", "count",
                 "steps")  # fmt: skip

    def __init__(self, block_tokens: int) -> None:
        self.steps = 0  # since the worker came; those of prompts alone are counted too
        self.count = 0  # of streams
        self.changes = 0  # how often one joined or left
        self.context_tokens = 0  # of all streams together
        self._block_tokens = block_tokens
        self._streams: dict[RequestId, Attempt] = {}  # in the order they joined
        self._finishes: list[tuple[int, int, Attempt]] = []  # heap; who left remains in it

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._streams.values())

    def pass_steps(self, steps: int) -> None:
        self.steps += steps
        self.context_tokens += steps * self.count

    def join(self, attempt: Attempt) -> None:
        attempt.move_to(Stage.RUNNING)
        attempt.finish_step = self.steps + attempt.job.target - attempt.generated
        attempt.base_tokens = attempt.tokens - self.steps
        self.count += 1
        self.changes += 1
        heapq.heappush(self._finishes, (attempt.finish_step, self.changes, attempt))
        self._streams[attempt.request.request] = attempt
        self.context_tokens += attempt.tokens

    def leave(self, attempt: Attempt) -> None:
        """With the tokens it has by now."""
        del self._streams[attempt.request.request]
        self.count -= 1
        self.changes += 1
        attempt.tokens = attempt.base_tokens + self.steps
        self.context_tokens -= attempt.tokens

    def latest(self) -> Attempt:
        return self._streams[next(reversed(self._streams))]

    # ── ends ─────────────────────────────────────────────────────────────────────────────────────

    def steps_to_end(self) -> int:
        """Until the first of the streams draws its last token; there must be one."""
        finishes = self._finishes
        while finishes[0][2].stage is not Stage.RUNNING:
            heapq.heappop(finishes)
        return finishes[0][0] - self.steps

    def take_ended(self) -> list[Attempt]:
        """Those that drew their last token; they have left."""
        ended = []
        while self.count and self.steps_to_end() <= 0:
            attempt = heapq.heappop(self._finishes)[2]
            self.leave(attempt)
            ended.append(attempt)
        return ended

    # ── memory ───────────────────────────────────────────────────────────────────────────────────

    def used_blocks(self) -> int:
        """For every stream, the tokens it has, the next one to be computed included."""
        if not self.count:
            return 0
        size = self._block_tokens
        shift = self.steps + size - 1  # rounds up
        return sum([(stream.base_tokens + shift) // size for stream in self._streams.values()])

    def used_blocks_max(self, steps: int = 0) -> int:
        """No fewer than they use after so many steps; found without looking at each."""
        context = self.context_tokens + steps * self.count
        return context // self._block_tokens + self.count

    def steps_within(self, blocks: int, steps: int) -> int:
        """How many of the next ``steps`` can be made before somebody lacks a block."""
        if self.used_blocks_max(steps) <= blocks:
            return steps
        size = self._block_tokens
        shifted = [s.base_tokens + self.steps + size - 1 for s in self._streams.values()]
        low, high = 0, steps
        while low < high:
            middle = (low + high + 1) // 2
            # The last of them begins when all others are done.
            if sum([(tokens + middle - 1) // size for tokens in shifted]) <= blocks:
                low = middle
            else:
                high = middle - 1
        return low
