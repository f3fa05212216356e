"""What a worker needs of the simulation around it."""

from typing import Any, Protocol

from pdserve.ids import RequestId, WorkerId
from pdserve.messages import Parked, Report, WorkerFailed
from pdserve.simulator.attempt import Attempt, Job


class Action(Protocol):
    """What happens at an instant. The argument is whatever was scheduled with it."""

    def __call__(self, now_ns: int, argument: Any, /) -> None: ...


class Surroundings(Protocol):
    def at(self, when_ns: int, action: Action, argument: object) -> None: ...

    def job(self, request: RequestId) -> Job: ...

    def hand_off(self, attempt: Attempt, now_ns: int) -> None: ...

    def report(self, report: Report, now_ns: int) -> None:
        """To the router. To be called last, for the router answers at once."""

    def say(self, worker: WorkerId, message: Parked | WorkerFailed, now_ns: int) -> None:
        """The same, of what is rare."""

    def ended(self, job: Job, now_ns: int) -> None:
        """Its last token is out."""
