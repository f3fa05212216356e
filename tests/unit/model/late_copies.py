"""A GPU played by the CPU: copies and kernels happen when somebody waits for them, not before."""

from collections import deque
from collections.abc import Callable

from torch import Tensor

from pdserve.model.copies import Copies


class LateCopies(Copies):
    def __init__(self) -> None:
        self.under_way: deque[Callable[[], object]] = deque()
        self.started = 0
        self.most = 0  # under way at once

    def after(self, event: object) -> None: ...
    def after_steps(self) -> None: ...

    def start(self, target: Tensor, source: Tensor) -> None:
        self.launch(lambda: target.copy_(source))

    def launch(self, kernels: Callable[[], object]) -> None:
        self.under_way.append(kernels)
        self.started += 1
        self.most = max(self.most, len(self.under_way))

    def mark(self) -> int:
        return self.started

    def wait(self, mark: int) -> None:
        while self.started - len(self.under_way) < mark:
            self.under_way.popleft()()

    def finish(self) -> None:
        self.wait(self.started)


class Pages:
    def __init__(self, *, works: bool = True) -> None:
        self.locked: dict[int, tuple[int, bool]] = {}
        self._works = works

    def lock(self, address: int, size: int, *, writable: bool) -> None:
        if not self._works:
            raise RuntimeError("not here")
        self.locked[address] = size, writable

    def unlock(self, address: int) -> None:
        del self.locked[address]
