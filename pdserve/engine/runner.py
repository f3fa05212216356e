"""What the loops need of ``model.runner.ModelRunner``: one forward pass over a packed batch."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pdserve.model.runner import Run


class Context(Protocol):
    @property
    def context_tokens(self) -> int: ...


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
        """Writes the KV of all tokens; float32 logits of the last token of each run that wants
        them, in order."""
        ...
