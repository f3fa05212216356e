"""When a node's store had been used how often. Pure: the clock's time is an argument.

The order of eviction counts uses of the store and looks at no clock. Two nodes count differently:
what a busy one used a thousand uses ago may be as fresh as what an idle one used last. So what goes
from one node to another has its age in time, which this translates, at either end.

A look at the count now and then is enough. Whatever happened between two looks is said to be as
young as it can be, and a moment to have had as few uses as it can have had.
"""

from bisect import bisect_left, bisect_right

LOOKS_MAX = 256
"""Beyond these one is forgotten whose neighbours are close for their age: the gaps between looks
come to some twentieths of how long ago they were."""


class UseTimes:
    def __init__(self, uses: int, now_ns: int) -> None:
        self._uses = [uses]
        self._times_ns = [now_ns]

    def __len__(self) -> int:
        return len(self._uses)

    def look(self, uses: int, now_ns: int) -> None:
        """Neither may be less than before."""
        if uses == self._uses[-1]:
            return
        self._uses.append(uses)
        self._times_ns.append(now_ns)
        if len(self._uses) > LOOKS_MAX:
            times_ns = self._times_ns
            index = min(
                range(1, LOOKS_MAX),
                key=lambda at: (times_ns[at + 1] - times_ns[at - 1]) / (now_ns - times_ns[at] + 1),
            )
            del self._uses[index], self._times_ns[index]

    def age_ns(self, use: int, now_ns: int) -> int:
        """How long ago that use was at least."""
        index = bisect_left(self._uses, use)
        return max(0, now_ns - self._times_ns[index]) if index < len(self._uses) else 0

    def uses_at(self, time_ns: int) -> int:
        """How many there had been by then at least; of a time before the first look, as many as
        there were at that."""
        return self._uses[max(0, bisect_right(self._times_ns, time_ns) - 1)]
