"""Copies between a pool on a GPU and the host's memory, beside the steps."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """They happen in the order in which they were started."""

    def after(self, event: Any) -> None:
        """Those started from now on happen after an event of the steps' stream."""
        ...

    def after_steps(self) -> None:
        """They happen after all steps launched so far."""
        ...

    def start(self, target: Tensor, source: Tensor) -> None:
        """Memory of the host must be locked (``pinned``), and stay as it is until it is done."""
        ...

    def launch(self, kernels: Callable[[], object]) -> None:
        """Kernels that happen in their turn, between copies."""
        ...

    def mark(self) -> Any:
        """For ``wait``: when what was started so far is done."""
        ...

    def wait(self, mark: Any) -> None: ...

    def finish(self) -> None:
        """Returns when all are done."""
        ...


class CudaCopies(Copies):
    """On a stream of their own: they neither wait for a step nor hold one up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def after(self, event: Any) -> None:
        self._stream.wait_event(event)

    def after_steps(self) -> None:
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def start(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def launch(self, kernels: Callable[[], object]) -> None:
        with torch.cuda.stream(self._stream):
            kernels()

    def mark(self) -> Any:
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def finish(self) -> None:
        self._stream.synchronize()
