"""A device that computes as late as it may: a step runs when somebody waits for it, not before.

What is launched runs in order. Who reads tokens waits for their step and no later one; who brings a
block in waits for all that was launched; who takes a block out waits for nothing, or for the step
that it names, and gets what is there. So a loop that relies on more than a GPU promises loses a
token or a block here.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from pdserve.messages import Token
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run
from tests.unit.engine.fakes import ADAPTERS, LAYER_COUNT, VOCABULARY, FakeRunner


class LateRunner(FakeRunner):
    def __init__(
        self,
        block_count: int = 64,
        *,
        habit: float = 0.0,
        adapters: Collection[str] = ADAPTERS,
    ) -> None:
        super().__init__(block_count, habit=habit, adapters=adapters)
        self.launched: deque[Callable[[], object]] = deque()
        bring_in, copy = self.pool.write_block, self.pool.copy_block

        def after_all(block: int, data: memoryview) -> None:
            self.finish()
            bring_in(block, data)

        def launched_too(source: int, target: int) -> None:
            self.launched.append(lambda: copy(source, target))

        def await_work(done: Any) -> None:
            self.finish(last=done)

        self.pool.await_layers = await_work  # type: ignore[method-assign]
        self.pool.write_block = after_all  # type: ignore[method-assign]
        self.pool.copy_block = launched_too  # type: ignore[method-assign]

    def step(
        self,
        runs: Sequence[Run],
        drawn_R: torch.Tensor | None = None,
        told: LayersTold | None = None,
    ) -> torch.Tensor:
        compute = super().step
        # As they are now: that is what a launch copies.
        runs = [replace(run, tokens=tuple(run.tokens), blocks=tuple(run.blocks)) for run in runs]
        logits_RV: Any = torch.full((sum(run.logits_count for run in runs), VOCABULARY), torch.nan)
        logits_RV.runner = self
        work = partial(self._compute, logits_RV, compute, runs, drawn_R)
        self.launched.append(work)
        if told is not None:
            told.tell(LAYER_COUNT, work)  # it has been launched, no more
        return logits_RV  # type: ignore[no-any-return]

    @staticmethod
    def _compute(logits_RV: Any, compute: Callable[..., Any], *arguments: Any) -> None:
        logits_RV.copy_(compute(*arguments))

    def finish(self, last: Callable[[], object] | None = None) -> None:
        """Runs what was launched, up to ``last`` or to the end."""
        while self.launched:
            work = self.launched.popleft()
            work()
            if work is last:
                return


class LateDrawn:
    """``model.drawn.Drawn`` there."""

    def __init__(self, logits_RV: Any) -> None:
        self._runner: LateRunner = logits_RV.runner
        self._tokens_R = torch.full((len(logits_RV),), -1)
        self._draw = lambda: self._tokens_R.copy_(logits_RV.argmax(dim=-1))
        self._runner.launched.append(self._draw)

    def of(self, rows: Sequence[int]) -> torch.Tensor:
        chosen_R = torch.full((len(rows),), -1)
        self._runner.launched.append(lambda: chosen_R.copy_(self._tokens_R[list(rows)]))
        return chosen_R

    def tokens(self) -> list[Token]:
        if self._draw in self._runner.launched:
            self._runner.finish(self._draw)
        return [Token(token) for token in self._tokens_R.tolist()]


def wait_for(logits_RV: Any) -> None:
    logits_RV.runner.finish()
