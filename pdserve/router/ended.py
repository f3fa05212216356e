"""What a worker said that it has ended, kept for as long as its last tokens may be under way.

A worker tells the router that a request has ended, and the gateway its last tokens, over two
connections. When its host dies, or cannot reach the gateway, the first may have come and the
second not: the router would have forgotten the request and the gateway would wait until the
deadline. So the worker's loss is the loss of these requests too; a gateway that has all their
tokens ignores it.
"""

from collections import OrderedDict
from typing import Final

from pdserve.clock import S
from pdserve.ids import RequestId, WorkerId
from pdserve.messages import Address, Lost
from pdserve.router.commands import Command, ToGateway

KEPT_NS: Final = 60 * S
"""Longer than any connection may go without a receipt, a postbox's patience included."""

ENDED_MAX: Final = 16_384
"""Of all workers together; the oldest are forgotten first."""


class _Ended:
    """No dataclass: the constructor of one is interpreted, and takes a microsecond."""

    __slots__ = ("at_ns", "attempt", "reply_to", "worker")

    def __init__(self, attempt: int, worker: WorkerId, reply_to: Address, at_ns: int) -> None:
        self.attempt = attempt
        self.worker = worker
        self.reply_to = reply_to
        self.at_ns = at_ns


class EndedBook:
    def __init__(self) -> None:
        self._ended: OrderedDict[RequestId, _Ended] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._ended)

    def note(
        self, request: RequestId, attempt: int, worker: WorkerId, reply_to: Address, now_ns: int
    ) -> None:
        self._ended.pop(request, None)
        self._ended[request] = _Ended(attempt, worker, reply_to, now_ns)
        while self._ended:
            oldest = next(iter(self._ended))
            is_old = self._ended[oldest].at_ns + KEPT_NS <= now_ns
            if not is_old and len(self._ended) <= ENDED_MAX:
                break
            del self._ended[oldest]

    def undelivered(self, request: RequestId, attempt: int, worker: WorkerId) -> list[Command]:
        """The worker says that it could not tell the gateway."""
        ended = self._ended.get(request)
        if ended is None or (ended.attempt, ended.worker) != (attempt, worker):
            return []
        return [self._lost(request)]

    def worker_lost(self, worker: WorkerId, now_ns: int) -> list[Command]:
        """It has died, or is taken for dead. Linear in the book."""
        doubtful = [
            request
            for request, ended in self._ended.items()
            if ended.worker == worker and ended.at_ns + KEPT_NS > now_ns
        ]
        return [self._lost(request) for request in doubtful]

    def _lost(self, request: RequestId) -> Command:
        ended = self._ended.pop(request)
        return ToGateway(ended.reply_to, Lost(request, ended.attempt, ended.worker))
