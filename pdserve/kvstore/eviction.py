"""Which cached block goes first when room is needed: the order of eviction.

``Lru`` takes the block whose last use is longest ago. ``Turns`` learns from what it sees how likely
a conversation is to be continued, and when, and takes the block that is worth least: that has the
fewest hits to expect for the time it would have to be kept.

*Turns.* Blocks are read again because a conversation goes on: the next prompt is the last one and
its answer with something behind. One that went on before goes on again more often than one that has
just begun, so conversations are told apart by how often that was (their *turn*, the last class for
all above). A conversation is recognised by the last keys that it wrote, for some time after its
blocks are gone: what was evicted too early is known once it is asked for.

*Worth.* Of conversations in their t-th turn, let S(x) be the share that has not gone on by age x.
One at age a that is kept until it goes on, but no longer than until age b, has a hit with
probability (S(a) − S(b)) / S(a) and takes room for the integral of S from a to b, over S(a). Its
worth is the best ratio of the two over all b: the index of Gittins (1979) of a job that may be
given up, which is also the hit density of LHD (Beckmann et al., NSDI 2018) at the best time to give
up. S is estimated as by Kaplan and Meier (1958): those that were forgotten, and those that wait
still, count up to the age they had. With F(a) = 1 − S(a), the ratio is the slope between two points
of the curve of F over the integral of S, so the best one is found on its upper hull.

Ages are counted in uses of the store, not in seconds: nothing here looks at a clock.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, Protocol

from pdserve.ids import BlockKey

TURNS = 8
"""Classes of conversations; those that went on more often than seven times are one."""

BUCKETS_PER_OCTAVE = 4
BUCKETS = 32 * BUCKETS_PER_OCTAVE
"""Of ages, up to 2**32 uses."""

KNOWN_MIN, KNOWN_MAX = 1024, 32_768
SLOTS_PER_KNOWN = 16
"""Conversations remembered: one for so many slots, within these bounds."""

NAMES_MAX = 4
"""Keys by which one conversation is found: where its last prompt ended, and its answer."""

REFRESH_ASKS = 64
"""Worths are computed anew after so many prompts, and not before a sixteenth as many as there are
conversations, since each is looked at."""

HISTORY = 16_384
"""Continuations after which all counts are halved, so that old habits are forgotten."""

PRIOR = 10.0
"""Conversations of the average kind that every turn is believed to have had."""

EvictionName = Literal["turns", "lru"]


class Eviction(Protocol):
    """``now`` and ages count uses of the store."""

    def asked(self, keys: Sequence[BlockKey], now: int) -> int:
        """A prompt asks for its prefix. The turn of its conversation."""
        ...

    def wrote(self, keys: Sequence[BlockKey], now: int) -> int:
        """Blocks up to the last of ``keys`` are stored, as part of a conversation of this turn."""
        ...

    def worth(self, turn: int, age: int) -> float:
        """Of keeping a block of such a conversation; of equals the older one goes."""
        ...


def eviction_of(name: EvictionName, slot_count: int) -> Eviction:
    return Turns(slot_count) if name == "turns" else Lru()


class Lru:
    def asked(self, keys: Sequence[BlockKey], now: int) -> int:
        return 0

    def wrote(self, keys: Sequence[BlockKey], now: int) -> int:
        return 0

    def worth(self, turn: int, age: int) -> float:
        return 0.0


@dataclass(slots=True, eq=False)
class _Conversation:
    turn: int
    last_use: int
    was_asked: bool  # since it last wrote: asking again is the same turn
    names: tuple[BlockKey, ...] = ()


class Turns:
    def __init__(self, slot_count: int) -> None:
        self._known_max = min(KNOWN_MAX, max(KNOWN_MIN, slot_count // SLOTS_PER_KNOWN))
        self._known: dict[_Conversation, None] = {}  # least recently used first
        self._by_name: dict[BlockKey, _Conversation] = {}
        self._went_on = [[0.0] * BUCKETS for _ in range(TURNS)]
        self._forgotten = [[0.0] * BUCKETS for _ in range(TURNS)]
        self._worths = [[0.0] * BUCKETS for _ in range(TURNS)]
        self._continuations = 0
        self._asks = 0  # since the worths began to be computed anew
        self._refreshing: Iterator[None] = iter(())

    def asked(self, keys: Sequence[BlockKey], now: int) -> int:
        self._asks += 1
        if self._asks >= max(REFRESH_ASKS, len(self._known) // 16):
            self._asks = 0
            self._refreshing = self._refresh(now)
        next(self._refreshing, None)
        known = self._find(keys)
        if known is None:
            return 0
        if not known.was_asked:
            self._went_on[known.turn][_bucket(now - known.last_use)] += 1
            self._continuations += 1
            known.turn = min(TURNS - 1, known.turn + 1)
            known.was_asked = True
        self._use(known, now)
        return known.turn

    def wrote(self, keys: Sequence[BlockKey], now: int) -> int:
        known = self._find(keys)
        if known is None:
            known = _Conversation(0, now, was_asked=False)
        known.was_asked = False
        # A next prompt may differ in the last block: that was not full, or is written otherwise.
        for key in keys[-2:]:
            if self._by_name.get(key) is not known:
                self._by_name[key] = known
                known.names += (key,)
        for key in known.names[:-NAMES_MAX]:
            self._unname(known, key)
        known.names = known.names[-NAMES_MAX:]
        self._use(known, now)
        if len(self._known) > self._known_max:
            self._forget(next(iter(self._known)), now)
        return known.turn

    def worth(self, turn: int, age: int) -> float:
        return self._worths[turn][_bucket(age)]

    def _find(self, keys: Sequence[BlockKey]) -> _Conversation | None:
        """By the deepest of the keys that is a name of one."""
        by_name = self._by_name
        for key in reversed(keys):
            known = by_name.get(key)
            if known is not None:
                return known
        return None

    def _use(self, known: _Conversation, now: int) -> None:
        known.last_use = now
        self._known.pop(known, None)
        self._known[known] = None

    def _forget(self, known: _Conversation, now: int) -> None:
        del self._known[known]
        for key in known.names:
            self._unname(known, key)
        self._forgotten[known.turn][_bucket(now - known.last_use)] += 1

    def _unname(self, known: _Conversation, key: BlockKey) -> None:
        if self._by_name.get(key) is known:  # it may have become another's
            del self._by_name[key]

    def _refresh(self, now: int) -> Iterator[None]:
        """One part with each prompt: all at once would be the slowest claims by far."""
        if self._continuations >= HISTORY:
            self._continuations //= 2
            for counts in (*self._went_on, *self._forgotten):
                counts[:] = [count / 2 for count in counts]
        ended = [counts.copy() for counts in self._forgotten]
        for known in self._known:
            ended[known.turn][_bucket(now - known.last_use)] += 1
        yield
        total = _total(self._went_on) + _total(ended)
        share = PRIOR / total if total else 0.0
        usual_went_on = [share * sum(column) for column in zip(*self._went_on, strict=True)]
        usual_ended = [share * sum(column) for column in zip(*ended, strict=True)]
        for turn in range(TURNS):
            yield
            self._worths[turn] = worths(
                [a + b for a, b in zip(self._went_on[turn], usual_went_on, strict=True)],
                [a + b for a, b in zip(ended[turn], usual_ended, strict=True)],
            )


def worths(went_on: Sequence[float], ended: Sequence[float]) -> list[float]:
    """The worth at the beginning of each bucket of ages, in hits per use of the store.

    Args:
        went_on: by bucket, conversations that were continued at that age.
        ended: those that were last seen at that age, and had not been continued.
    """
    both = zip(reversed(went_on), reversed(ended), strict=True)
    reached = list(accumulate(continued + over for continued, over in both))
    reached.reverse()
    hit, room, left = 0.0, 0.0, 1.0  # F, the integral of S, and S
    curve = [(room, hit)]
    for bucket, count in enumerate(went_on):
        room += left * _WIDTHS[bucket]
        if reached[bucket] > 0:
            left *= 1 - count / reached[bucket]
        hit = 1 - left
        curve.append((room, hit))
    hull = [curve.pop()]
    slopes: list[float] = []
    while curve:
        room, hit = curve.pop()
        # Behind the best end the curve is flatter than the way there: those points are no ends.
        while len(hull) > 1 and _slope(room, hit, hull[-2]) >= _slope(room, hit, hull[-1]):
            hull.pop()
        slopes.append(_slope(room, hit, hull[-1]))
        hull.append((room, hit))
    slopes.reverse()
    return slopes


def _total(counts: Sequence[Sequence[float]]) -> float:
    return sum((sum(each) for each in counts), 0.0)


def _slope(room: float, hit: float, end: tuple[float, float]) -> float:
    wider = end[0] - room
    return (end[1] - hit) / wider if wider > 0 else 0.0


def _bucket(age: int) -> int:
    return min(BUCKETS - 1, int(BUCKETS_PER_OCTAVE * math.log2(age + 1)))


_EDGES = [2 ** (bucket / BUCKETS_PER_OCTAVE) - 1 for bucket in range(BUCKETS + 1)]
_WIDTHS = [end - begin for begin, end in pairwise(_EDGES)]
