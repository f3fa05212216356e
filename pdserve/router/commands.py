"""What the core wants done. The shell sends each message to the peer it names, in this order."""

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
from pdserve.values import value

WorkerMessage = Dispatch | Preempt | Cancel | Resume | FetchAhead | Goodbye
"""What the router says to a worker."""


@value
class ToWorker:
    worker: WorkerId
    message: WorkerMessage


@value
class ToGateway:
    gateway: Address
    message: Refused | Lost


Command = ToWorker | ToGateway
