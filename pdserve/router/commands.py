"""What the core wants done. The shell sends each message to the peer it names, in this order."""

from dataclasses import dataclass

from pdserve.ids import WorkerId
from pdserve.messages import Address, Cancel, Dispatch, Goodbye, Lost, Preempt, Refused, Resume


@dataclass(frozen=True, slots=True)
class ToWorker:
    worker: WorkerId
    message: Dispatch | Preempt | Cancel | Resume | Goodbye


@dataclass(frozen=True, slots=True)
class ToGateway:
    gateway: Address
    message: Refused | Lost


Command = ToWorker | ToGateway
