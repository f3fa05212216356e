"""What becomes of a packet between two hosts. Pure: no clock, no socket; chance comes from a seed.

A link has a direction, so a partition may be one way: A's packets arrive at B and B's answers do
not arrive at A. What nobody has set is a perfect link without delay. The order of packets is kept
where their delay is the same, as on a wire.

Loss hits every packet alike and independently, those that are sent again too.
"""

import random
from dataclasses import dataclass

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two hosts."""

    loss_ratio: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0  # added to the delay, uniform: more than the gaps reorders packets
    duplicate_ratio: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss_ratio", "duplicate_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be in [0, 1]")
        for name in ("delay_ms", "jitter_ms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must not be negative")


PERFECT = Link()
CUT = Link(loss_ratio=1.0)


class Links:
    """All links of a switch, and what has been lost on them."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._links: dict[tuple[str, str], Link] = {}
        self.carried_count = 0
        self.lost_count = 0

    def set(self, source: str, target: str, link: Link) -> None:
        if link == PERFECT:
            self._links.pop((source, target), None)
        else:
            self._links[source, target] = link

    def arrivals_ns(self, source: str, target: str, *, now_ns: int) -> list[int]:
        """When copies of a packet that is sent now arrive; empty: it is lost."""
        self.carried_count += 1
        link = self._links.get((source, target))
        if link is None:
            return [now_ns]
        if self._chance.random() < link.loss_ratio:
            self.lost_count += 1
            return []
        copies = 2 if self._chance.random() < link.duplicate_ratio else 1
        return [
            now_ns + round((link.delay_ms + self._chance.random() * link.jitter_ms) * NS_PER_MS)
            for _ in range(copies)
        ]
