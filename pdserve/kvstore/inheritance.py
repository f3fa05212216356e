"""What a node makes of the slots of the one that died over the same arena. Pure.

The dead node's books are gone; what it wrote into the arena is there: a header for each slot,
written after the event that changed it and before anybody was told, with a checksum of its own. So
a header that says COMMITTED has its block's bytes behind it, all of them, and one that says FREE
has nobody who may write there. Whatever else it says, somebody may be reading or writing still.

    COMMITTED, and so is all that it builds on   ->  COMMITTED again, verified when it is read
    FREE                                         ->  FREE
    anything else, or a header that is wrong     ->  DRAINING until all users of the dead are gone

Bytes are not looked at here: that would take a second per 10 GB. Readers verify a block's checksum
when they read it first; what is wrong is condemned and missing from then on.

An event may have been cut in half, some of its headers written and others not. Then a block may be
in two slots (both have its bytes; the first is kept), or above one that is not there any more (it
is dropped). Uses, turns, pins and tenants are not in headers: all blocks are used longest ago, the
deepest going first, nobody has pinned them, and they are on the account of those without one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import SlotId
from pdserve.kvstore.headers import NO_PARENT, HeaderColumns
from pdserve.kvstore.slot_states import COMMITTED, DRAINING, FREE

GENERATIONS_SKIPPED = 1 << 32
"""Above all that are known, where a wrong header may have said anything: none may come twice."""

_UNKNOWN, _NOT_ADOPTED = -3, -2


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The slots of an arena as a new node begins with them, one row for each.

    states: uint8, of ``slot_states``: FREE, COMMITTED or DRAINING.
    parents: uint32, ``headers.NO_PARENT`` for none; depths: uint32; keys: 16 bytes.
    """

    states: NDArray[np.uint8]
    generations: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    keys: NDArray[np.uint8]
    parents: NDArray[np.uint32]
    depths: NDArray[np.uint32]
    held: bool = False  # by clients of the dead node: no block may be evicted

    @property
    def adopted_count(self) -> int:
        return int((self.states == COMMITTED).sum())

    @property
    def adopted_slots(self) -> list[SlotId]:
        """Parents before children."""
        slots = (self.states == COMMITTED).nonzero()[0]
        ordered: list[SlotId] = slots[self.depths[slots].argsort(kind="stable")].tolist()
        return ordered

    @property
    def draining_slots(self) -> list[SlotId]:
        slots: list[SlotId] = (self.states == DRAINING).nonzero()[0].tolist()
        return slots


def inherit(headers: HeaderColumns) -> Inheritance:
    """What becomes of each slot."""
    sound = headers.is_sound
    candidates = sound & (headers.states == COMMITTED) & headers.keys.any(axis=1)
    depths = _depths(headers.parents, _first_of_each_key(headers.keys, candidates))
    adopted = depths >= 0
    states = np.where(adopted, COMMITTED, DRAINING).astype(np.uint8)
    states[sound & (headers.states == FREE)] = FREE
    generations = headers.generations.copy()
    generations[~sound] = generations[sound].max(initial=0) + np.uint64(GENERATIONS_SKIPPED)
    return Inheritance(
        states,
        generations,
        headers.checksums,
        headers.keys,
        headers.parents,
        np.maximum(depths, 0).astype(np.uint32),
    )


def _first_of_each_key(keys: NDArray[np.uint8], candidates: NDArray[np.bool_]) -> NDArray[np.bool_]:
    slots = candidates.nonzero()[0]
    _, first = np.unique(keys[slots], axis=0, return_index=True)
    chosen = np.zeros_like(candidates)
    chosen[slots[first]] = True
    return chosen


def _depths(parents: NDArray[np.uint32], candidates: NDArray[np.bool_]) -> NDArray[np.int64]:
    """By slot: of its block in a chain of candidates that is whole; else -1."""
    known = np.where(candidates, _UNKNOWN, _NOT_ADOPTED).tolist()
    above = parents.tolist()
    count = len(above)
    for start in candidates.nonzero()[0].tolist():
        path = []
        slot = start
        while slot < count and known[slot] == _UNKNOWN:
            known[slot] = _NOT_ADOPTED  # so that a ring, which nobody writes, ends
            path.append(slot)
            slot = above[slot]
        depth = known[slot] if slot < count else -1 if slot == NO_PARENT else _NOT_ADOPTED
        for each in reversed(path):
            depth = depth if depth == _NOT_ADOPTED else depth + 1
            known[each] = depth
    return np.maximum(np.array(known, np.int64), -1)
