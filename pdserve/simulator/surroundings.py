"""What a worker needs of the simulation around it.

A base class and no ``Protocol``: compiled, a call then goes through a table instead of a search by
name, dozens of times per request.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

from pdserve.ids import RequestId, WorkerId
from pdserve.messages import Parked, Report, WorkerFailed
from pdserve.simulator.attempt import Attempt, Job


class Action(Protocol):
    """What happens at an instant. The argument is whatever was scheduled with it."""

    def __call__(self, now_ns: int, argument: Any, /) -> None: ...


class Surroundings(ABC):
    @abstractmethod
    def at(self, when_ns: int, action: Action, argument: object) -> None: ...

    @abstractmethod
    def job(self, request: RequestId) -> Job: ...

    @abstractmethod
    def hand_off(self, attempt: Attempt, now_ns: int) -> None: ...

    @abstractmethod
    def report(self, report: Report, now_ns: int) -> None:
        """To the router. To be called last, for the router answers at once."""

    @abstractmethod
    def say(self, worker: WorkerId, message: Parked | WorkerFailed, now_ns: int) -> None:
        """The same, of what is rare."""

    @abstractmethod
    def ended(self, job: Job, now_ns: int) -> None:
        """Its last token is out."""
