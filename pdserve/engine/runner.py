"""What the loops need of ``model.runner.ModelRunner``: one forward pass over a packed batch."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pdserve.model.runner import Run


class Context(Protocol):
    @property
    def context_tokens(self) -> int: ...
    @property
    def attention_like_linear_tokens(self) -> int: ...


class PoolShape(Protocol):
    @property
    def block_count(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...


class Runner(Protocol):
    @property
    def architecture(self) -> Context: ...
    @property
    def pool(self) -> PoolShape: ...
    def step(self, runs: Sequence[Run]) -> Tensor:
        """Writes the KV of all tokens; float32 logits, ``logits_count`` rows for each run, in
        order."""
        ...


def wait_for(logits: Tensor) -> None:
    """Return when the step that gives ``logits`` is done: a GPU's step returns before that."""
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
