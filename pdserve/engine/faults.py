"""Faults that tests put into forward passes: ``PDSERVE_FAULT_STEP``, read when a worker starts.

A comma-separated list of ``WHAT:TOKEN`` or ``WHAT:TOKEN:PATH``. A step that computes the token

    exit     ends the process, as a crash in a kernel does
    raise    raises, as a kernel that finds no memory does
    hang     never returns, as a deadlock does

With a path only the first step that meets it does so, on whichever worker: the fault creates the
file, and one that finds it lets the step pass.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.ops import LayersTold
from pdserve.model.runner import Run

STEP_ENV = "PDSERVE_FAULT_STEP"

EXIT_CODE = 86

What = Literal["exit", "raise", "hang"]


@dataclass(frozen=True, slots=True)
class StepFault:
    what: What
    token: int
    path: str | None = None  # of what says that it has happened

    def strike(self) -> None:
        if self.path is not None:
            try:
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        match self.what:
            case "exit":
                os._exit(EXIT_CODE)
            case "raise":
                raise MemoryError(f"told so by {STEP_ENV}, for token {self.token}")
            case "hang":
                threading.Event().wait()


def faults_of(text: str) -> tuple[StepFault, ...]:
    """What ``STEP_ENV`` says.

    Raises:
        ConfigError: some of it cannot be read.
    """
    return tuple(_fault(each) for each in text.split(",") if each)


def _fault(text: str) -> StepFault:
    what, _, rest = text.partition(":")
    token, _, path = rest.partition(":")
    if what not in ("exit", "raise", "hang") or not token.isdigit():
        raise ConfigError(f"{STEP_ENV} has {text!r}, must be exit, raise or hang, ':', a token")
    return StepFault(what, int(token), path or None)  # type: ignore[arg-type]  # it is one of them


class FaultyRunner:
    """A runner with faults in its steps, and otherwise the one that it wraps."""

    def __init__(self, runner: Any, faults: Sequence[StepFault]) -> None:
        self._runner = runner
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(
        self,
        runs: Sequence[Run],
        drawn_R: Tensor | None = None,
        told: LayersTold | None = None,
    ) -> Tensor:
        for fault in self._faults:
            if any(fault.token in run.tokens for run in runs):
                fault.strike()
        logits: Tensor = self._runner.step(runs, drawn_R, told)
        return logits
