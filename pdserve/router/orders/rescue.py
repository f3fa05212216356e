"""Rescue: a stated bound on waiting, at a capped price.

Who has waited longer than ``after + ratio · own prefill`` may be served out of turn, oldest claim
first, but the rescued together get only a share ``f`` of the pool's time: each is paid for from a
bucket that fills at ``f`` per worker. So

    wait ≤ after + ratio · own prefill + (claims ahead) / (f · workers) + one non-preemptible piece

holds whatever else arrives, and under overload the order of service stays what it was for the
other ``1 − f``. Promoting everybody who waited too long, without a cap, is first come, first served
exactly when it hurts most.

Who runs is not stopped for a claim: at full load there are always claims, and each would have some
prefill called back that had only just begun.

A claim does not take the entry from its level: if its turn comes there first, so much the better.
Such a dispatch stands until something of it is computed (``SkipJoin.yields``). Were it taken back
before that for somebody shorter, the claim would begin again behind all that have come up since, as
often as anybody shorter comes.
"""

import math
from collections import deque
from typing import Final

from pdserve.clock import S
from pdserve.ids import RequestId
from pdserve.router.deadlines import Deadlines
from pdserve.router.entry import Entry

PIECE_MAX_NS: Final = 4 * S
"""The longest piece of work for which a claim that has credit may have to wait."""

DEAD_CLAIMS_MAX: Final = 64
"""Claims of requests that wait no more, kept beyond as many as there are live ones."""


class Claim:
    """No dataclass, for the reason of ``placement.Choice``."""

    __slots__ = ("bound_ns", "due_ns", "entry", "work_ns")

    def __init__(self, entry: Entry, work_ns: int, due_ns: int) -> None:
        self.entry = entry
        self.work_ns = work_ns
        self.due_ns = due_ns
        self.bound_ns = 0  # the instant by which it is dispatched at the latest


class Rescue:
    def __init__(self, *, after_ns: int, ratio: float, share: float) -> None:
        self._after_ns = after_ns
        self._ratio = ratio
        self.share = share
        self._workers = 1
        self._due = Deadlines()
        self._next_due_ns = math.inf  # nobody is due before
        self._waiting: dict[RequestId, Claim] = {}
        self._claims: dict[RequestId, Claim] = {}  # due ones, oldest first
        self._line: deque[Claim] = deque()
        self._claimed_ns = 0
        self._credit_ns = 0.0  # of worker time; below 0 a rescue is still being paid for
        self._credit_at_ns = 0

    def set_workers(self, count: int) -> None:
        self._workers = max(1, count)

    def due_ns(self, entry: Entry) -> int:
        """From when on it has a claim if it waits."""
        return entry.arrived_ns + self._after_ns + round(self._ratio * entry.work_ns)

    def add(self, entry: Entry) -> None:
        due_ns = self.due_ns(entry)
        self._waiting[entry.id] = Claim(entry, entry.work_ns, due_ns)
        self._due.add(entry.id, due_ns)
        self._next_due_ns = min(self._next_due_ns, due_ns)

    def remove(self, request: RequestId) -> None:
        del self._waiting[request]
        claim = self._claims.pop(request, None)
        if claim is not None:
            self._claimed_ns -= claim.work_ns
        self._due.remove(request)
        if len(self._line) > 2 * len(self._claims) + DEAD_CLAIMS_MAX:
            self._line = deque(claim for claim in self._line if self._is_live(claim))

    def head(self, now_ns: int) -> Entry | None:
        """Whom to rescue now, or None: nobody is due, or there is no credit."""
        if now_ns >= self._next_due_ns:
            self._collect(now_ns)
        if not self._claims:
            return None
        self._refill(now_ns)
        while not self._is_live(self._line[0]):
            self._line.popleft()
        return self._line[0].entry if self._credit_ns >= 0 else None

    def pay(self, entry: Entry) -> None:
        """It was dispatched because of its claim."""
        self._credit_ns -= entry.work_ns

    def bound_ns(self, request: RequestId) -> int | None:
        """The instant by which a claim is served, but for the piece of work then running."""
        claim = self._claims.get(request)
        return None if claim is None else claim.bound_ns

    def _is_live(self, claim: Claim) -> bool:
        return self._claims.get(claim.entry.id) is claim

    def _collect(self, now_ns: int) -> None:
        claims = [self._waiting[request] for request in self._due.due(now_ns)]
        for claim in sorted(claims, key=lambda claim: (claim.due_ns, claim.entry.order)):
            self._refill(max(claim.due_ns, self._credit_at_ns))
            debt_ns = max(0.0, -self._credit_ns)
            rate = self.share * self._workers
            claim.bound_ns = self._credit_at_ns + round((self._claimed_ns + debt_ns) / rate)
            self._claims[claim.entry.id] = claim
            self._claimed_ns += claim.work_ns
            self._line.append(claim)
        next_ns = self._due.next_ns()
        self._next_due_ns = math.inf if next_ns is None else next_ns

    def _refill(self, now_ns: int) -> None:
        """Credit does not pile up: an idle hour must not pay for a storm of rescues. But what is
        earned while a claim waits for the pieces that run is not lost to those behind it."""
        rate = self.share * self._workers
        most_ns = rate * PIECE_MAX_NS if self._claims else 0.0
        self._credit_ns = min(most_ns, self._credit_ns + (now_ns - self._credit_at_ns) * rate)
        self._credit_at_ns = now_ns
