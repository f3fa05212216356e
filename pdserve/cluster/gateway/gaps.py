"""Tokens that wait for those before them, and for how long.

A request that was parked has its tokens from two workers. The first may have died since, or may not
reach this gateway, with tokens that it had generated and the second goes on behind. Nobody else
knows of it: the router takes the request for the second one's, or for ended. So whoever misses
tokens for too long asks again, from where delivery stands.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from pdserve.cluster.gateway.delivery import Delivery
from pdserve.ids import RequestId

log = logging.getLogger(__name__)

GAP_S: Final = 3.0
"""As long as anybody's silence is borne. Two connections that are late are not so far apart."""


class GapWatch:
    """One timer for each request that has a gap; none for others."""

    def __init__(
        self, find: Callable[[RequestId], object], again: Callable[[Delivery], None]
    ) -> None:
        """
        Args:
            find: the delivery of a request that has not ended, else None.
            again: begins its next attempt.
        """
        self._find = find
        self._again = again
        self._watched: set[RequestId] = set()

    def look(self, request: RequestId, delivery: object) -> None:
        """After each delta, which may have left a gap."""
        if isinstance(delivery, Delivery) and delivery.has_gap and request not in self._watched:
            self._watched.add(request)
            attempt, first = delivery.request.attempt, len(delivery.tokens)
            asyncio.get_running_loop().call_later(GAP_S, self._close, request, attempt, first)

    def _close(self, request: RequestId, attempt: int, first: int) -> None:
        self._watched.discard(request)
        delivery = self._find(request)
        if not isinstance(delivery, Delivery) or delivery.finished or not delivery.has_gap:
            return
        if (delivery.request.attempt, len(delivery.tokens)) != (attempt, first):
            self.look(request, delivery)  # it is another gap
            return
        log.warning("%s: token %d did not come, attempt %d follows", request, first, attempt + 1)
        self._again(delivery)
