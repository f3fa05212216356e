"""What the loops need of ``model.runner.ModelRunner``: one forward pass over a packed batch."""

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pdserve.errors import IllegalTransition, RankLost
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run


class Context(Protocol):
    @property
    def context_tokens(self) -> int: ...
    @property
    def layer_count(self) -> int: ...
    @property
    def attention_like_linear_tokens(self) -> int: ...


class PoolShape(Protocol):
    @property
    def block_count(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    def copy_block(self, source: int, target: int) -> None:
        """Of all layers, and before the next step."""
        ...


class Runner(Protocol):
    @property
    def architecture(self) -> Context: ...
    @property
    def pool(self) -> PoolShape: ...
    @property
    def adapters(self) -> Container[str]:
        """The digests of those that a run may name."""
        ...

    def step(
        self,
        runs: Sequence[Run],
        drawn_R: Tensor | None = None,
        told: LayersTold | None = None,
    ) -> Tensor:
        """Writes the KV of all tokens; float32 logits, ``logits_count`` rows for each run, in
        order. ``drawn_R``, on the device, stands for the tokens of ``runs``, all of one token.
        ``told`` hears of layers that are written."""
        ...


def wait_for(logits: Tensor) -> None:
    """Return when the step that gives ``logits`` is done: a GPU's step returns before that."""
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()  # not for copies beside it


def ends_worker(error: Exception) -> bool:
    """Whether nothing can be computed here after this error: a follower is gone, or the device's
    context is broken, as CUDA's is after any error but want of memory."""
    if isinstance(error, RankLost | IllegalTransition):
        return True
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
