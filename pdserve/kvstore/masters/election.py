"""Which of several masters leads. Pure: the seat is somebody else's table, the time an argument.

Whoever leads holds the *seat* of the metadata under an epoch of its own, and renews it by raising
its beat. Who does not lead watches the beat. One that stands still for ``LEASE_NS`` of the
watcher's own monotonic clock is taken to be dead, and the watcher bids for the seat, with a fresh
epoch, on the condition that it still is as it was seen. So a renewal and a takeover exclude each
other by the table's compare-and-set; no two clocks are compared, and one that runs fast costs a
change of leaders, not two leaders under one epoch.

A leader that was stopped and wakes up does not know of its end. What keeps it from doing harm is
not this file but the epoch, which goes with all that it says: a node that has heard of a later one
refuses it (``Fence``), and the refusal is how it learns. A leader that cannot reach the table goes
on: nobody else can reach the seat either, or somebody has taken it and is obeyed from then on.
"""

from dataclasses import dataclass, replace

from pdserve.clock import MS
from pdserve.errors import StaleEpoch
from pdserve.kvstore.masters.metadata import Seat
from pdserve.messages import Address

BEAT_NS = 250 * MS
"""Between two looks at the seat, of leaders and of those who stand by."""

LEASE_NS = 1_000 * MS
"""Four beats: one that the table answers late, or a host that is busy, costs no change."""


@dataclass(frozen=True, slots=True)
class Renew:
    """Put ``after`` where ``seen`` is."""

    seen: Seat
    after: Seat


@dataclass(frozen=True, slots=True)
class Take:
    """Draw an epoch above ``above`` and put this master where ``seen`` is."""

    seen: Seat | None
    above: int


class Election:
    """One master's part in it."""

    def __init__(self, master: str, address: Address) -> None:
        self.master = master
        self._address = address
        self._held: Seat | None = None
        self._watched: Seat | None = None  # as it was when it last changed
        self._changed_ns = 0
        self._above = 0
        self._suspected = 0

    @property
    def epoch(self) -> int | None:
        """Under which this master acts; None: it stands by."""
        return None if self._held is None else self._held.epoch

    @property
    def leader(self) -> Seat | None:
        """Who leads, as far as is known here."""
        return self._watched if self._held is None else self._held

    def look(self, seat: Seat | None, now_ns: int) -> Renew | Take | None:
        """What to do about the seat, as it is in the table now."""
        if self._held is not None:
            # By its epoch: of a renewal whose answer was lost the beat is not the one known here.
            if seat is not None and seat.epoch == self._held.epoch and not seat.is_vacant:
                self._held = seat
                return Renew(seat, replace(seat, beat=seat.beat + 1))
            self._held = None  # somebody took it
        if seat is None or seat.is_vacant:
            return Take(seat, self._above)
        if seat.epoch == self._suspected and seat == self._watched:
            return Take(seat, max(seat.epoch, self._above))
        if seat != self._watched:
            self._watched, self._changed_ns, self._suspected = seat, now_ns, 0
        elif now_ns - self._changed_ns >= LEASE_NS:
            return Take(seat, max(seat.epoch, self._above))
        return None

    def seat_of(self, bid: Take, epoch: int) -> Seat:
        """What to put there, with the epoch that was drawn."""
        assert epoch > bid.above, f"epoch {epoch} is not above {bid.above}"
        assert bid.seen is None or epoch > bid.seen.epoch, f"{epoch} is not above {bid.seen}"
        return Seat(self.master, self._address, epoch)

    def won(self, seat: Seat) -> None:
        """The table has taken what was put there."""
        self._held = self._watched = seat

    def refused(self) -> None:
        """The seat was not as it was seen: another one was faster."""
        self._held = None

    def fenced(self, epoch: int) -> None:
        """A node obeys ``epoch``, so this master's time is over; its next epoch is above that one,
        also where the table knows of none so high (it was lost, and begun anew)."""
        self._above = max(self._above, epoch)
        if self._held is not None and self._held.epoch < epoch:
            self._held = None

    def suspect(self, epoch: int) -> None:
        """The leader of this epoch has hung up, as its process does when it dies: if it has not
        renewed since it was last looked at, its lease need not be waited for."""
        self._suspected = epoch

    def leaving(self) -> Renew | None:
        """What an orderly end says, so that nobody waits for the lease."""
        held, self._held = self._held, None
        return None if held is None else Renew(held, replace(held, is_vacant=True))


class Fence:
    """At those who are told what to do: the highest epoch that any master spoke under."""

    def __init__(self) -> None:
        self.epoch = 0

    def admit(self, epoch: int) -> None:
        """Raises StaleEpoch for a master that has been replaced."""
        if epoch < self.epoch:
            raise StaleEpoch(
                f"a master speaks under epoch {epoch}, and epoch {self.epoch} has begun: another "
                "one leads"
            )
        self.epoch = epoch
