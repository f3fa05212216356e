"""Figures and sets with one element per worker, its *slot*, of which the extremes are asked again
and again while one element changes at a time.

Looking through a thousand elements takes a microsecond, and a decision would look five times. So
what was found is kept, and mended where a change says all that is needed: one that becomes the
least is the least. Only where the least itself has become larger does everybody have to be looked
at again.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SETS_MAX = 1024
"""Sets of slots whose members are remembered: the readers of one store come again and again."""

Floats = NDArray[np.float64]


@lru_cache(maxsize=SETS_MAX)
def slots_of(bits: int) -> NDArray[np.intp]:
    """The members of a bit set, ascending. Not to be written to: it is remembered."""
    packed = np.frombuffer(bits.to_bytes(-(-bits.bit_length() // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little").nonzero()[0]


def bits_of(mask: NDArray[np.bool_]) -> int:
    """A mask over the arrays as a bit set of slots."""
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


class Openings:
    """When each slot takes a prompt; infinite: it takes none."""

    def __init__(self) -> None:
        self.opens_ns: Floats = np.empty(0)  # to be written by ``enter`` alone
        self._knows_soonest = False
        self._soonest_ns = math.inf
        self._soonest_slot = 0  # the first of equal ones
        self._knows_next = False
        self._next_ns = math.inf  # least of the others
        self._bits = 0  # of the slots that were open
        self._bits_from_ns = 0  # then, and
        self._bits_until_ns = -math.inf  # up to this; −inf: nobody has asked

    def grow(self, count: int) -> None:
        """To so many slots; the new ones take nothing."""
        self.opens_ns = np.append(self.opens_ns, np.full(count - len(self.opens_ns), math.inf))
        self._knows_soonest = self._knows_next = False
        self._bits_until_ns = -math.inf

    def enter(self, slot: int, opens_ns: float) -> None:
        opens_ns = float(opens_ns)  # an int would be compared by digits that the array has not
        before_ns: float = self.opens_ns.item(slot)
        self.opens_ns[slot] = opens_ns
        if self._knows_soonest:
            self._mend_soonest(slot, opens_ns, before_ns)
        if self._bits_until_ns > -math.inf:
            bit = 1 << slot
            if opens_ns <= self._bits_from_ns:
                self._bits |= bit
            else:
                self._bits_until_ns = min(self._bits_until_ns, opens_ns)
                if self._bits & bit:
                    self._bits ^= bit

    def _mend_soonest(self, slot: int, opens_ns: float, before_ns: float) -> None:
        if slot == self._soonest_slot:
            stays = opens_ns <= self._soonest_ns
            if not stays and self._knows_next:
                stays = opens_ns < self._next_ns
            self._soonest_ns = opens_ns
            if not stays:
                self._knows_soonest = self._knows_next = False
        elif opens_ns < self._soonest_ns or (
            opens_ns == self._soonest_ns and slot < self._soonest_slot
        ):
            self._knows_next, self._next_ns = True, self._soonest_ns
            self._soonest_ns, self._soonest_slot = opens_ns, slot
        elif self._knows_next and opens_ns <= self._next_ns:
            self._next_ns = opens_ns
        elif before_ns == self._next_ns:
            self._knows_next = False

    def soonest_ns(self) -> float:
        """The least; infinite where there are no slots."""
        if not self._knows_soonest:
            self._soonest_ns = math.inf
            if len(self.opens_ns):
                self._soonest_slot = int(self.opens_ns.argmin())  # faster than min()
                self._soonest_ns = self.opens_ns.item(self._soonest_slot)
            self._knows_soonest, self._knows_next = True, False
        return self._soonest_ns

    def next_ns(self) -> float:
        """The least but one, counting equal ones. Found without looking for all that are open:
        where workers are busy, one is or none."""
        soonest_ns = self.soonest_ns()
        if soonest_ns == math.inf:
            return math.inf
        if not self._knows_next:
            opens_ns, slot = self.opens_ns, self._soonest_slot
            opens_ns[slot] = math.inf
            self._next_ns = opens_ns.item(opens_ns.argmin())
            opens_ns[slot] = soonest_ns
            self._knows_next = True
        return self._next_ns

    def only_slot(self, instant_ns: float) -> int | None:
        """The one that is open by then; None: several are. One must be."""
        assert self.soonest_ns() <= instant_ns
        return None if self.next_ns() <= instant_ns else self._soonest_slot

    def is_another(self, instant_ns: float, *, but: int) -> bool:
        """Whether one is open by then, ``but`` left aside."""
        if self.soonest_ns() > instant_ns:
            return False
        return self._soonest_slot != but or self.next_ns() <= instant_ns

    def bits(self, now_ns: int) -> int:
        """Bit set of those that are open. Kept up to date until time opens the next one."""
        if not self._bits_from_ns <= now_ns < self._bits_until_ns:
            is_open = self.opens_ns <= now_ns
            self._bits, self._bits_from_ns = bits_of(is_open), now_ns
            later_ns = np.where(is_open, math.inf, self.opens_ns)
            self._bits_until_ns = later_ns.item(later_ns.argmin()) if len(later_ns) else math.inf
        return self._bits

    def check(self) -> None:
        """Assert that what is kept is what one would find. Linear; for tests."""
        ordered_ns = sorted(self.opens_ns.tolist())
        if ordered_ns:
            assert self.soonest_ns() == ordered_ns[0]
            assert self._soonest_slot == int(self.opens_ns.argmin())
            assert self.next_ns() == ordered_ns[1]
        if self._bits_until_ns > -math.inf:
            assert self._bits == bits_of(self.opens_ns <= self._bits_from_ns)
            later_ns = [ns for ns in ordered_ns if ns > self._bits_from_ns]
            assert self._bits_until_ns <= min(later_ns, default=math.inf)


class Largest:
    """The largest of the slots' figures; −inf: none."""

    def __init__(self) -> None:
        self.values: Floats = np.empty(0)  # to be written by ``enter`` alone
        self._known = False
        self._slot = 0  # the first of equal ones
        self._value = -math.inf  # there

    def grow(self, count: int) -> None:
        """To so many slots; the new ones have none."""
        self.values = np.append(self.values, np.full(count - len(self.values), -math.inf))
        self._known = False

    def enter(self, slot: int, value: float) -> None:
        value = float(value)  # as the array has it
        self.values[slot] = value
        if slot == self._slot:
            self._known = self._known and value >= self._value
            self._value = value
        elif value > self._value or (value == self._value and slot < self._slot):
            self._value, self._slot = value, slot

    def slot(self) -> int | None:
        """Where it is; None: nobody has one."""
        if not self._known:
            if not len(self.values):
                return None
            self._slot = int(self.values.argmax())
            self._value = self.values.item(self._slot)
            self._known = True
        return None if self._value == -math.inf else self._slot

    def check(self) -> None:
        """Assert that what is kept is what one would find. Linear; for tests."""
        if len(self.values):
            slot = int(self.values.argmax())
            assert self.slot() == (None if self.values.item(slot) == -math.inf else slot)
