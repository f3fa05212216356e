"""What the core wants done. The shell sends each message to the peer it names, in this order."""

from dataclasses import dataclass

from pdserve.ids import WorkerId
from pdserve.messages import (
    Address,
    Cancel,
    Dispatch,
    FetchAhead,
    Goodbye,
    Lost,
    Preempt,
    Refused,
    Resume,
)

WorkerMessage = Dispatch | Preempt | Cancel | Resume | FetchAhead | Goodbye
"""What the router says to a worker."""


@dataclass(frozen=True, slots=True)
class ToWorker:
    worker: WorkerId
    message: WorkerMessage


@dataclass(frozen=True, slots=True)
class ToGateway:
    gateway: Address
    message: Refused | Lost


Command = ToWorker | ToGateway
