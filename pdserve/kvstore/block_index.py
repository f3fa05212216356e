"""Which nodes have which blocks, of a whole cluster: sorted columns, no object per block. Pure.

A *location* is a pair of a block's key and a node's number. They lie in three columns of 18 bytes
together, in the order of the key's last eight bytes (the first ones are a tenant's, the same for
all of its keys), and of its first eight where those are equal. Whoever looks a key up finds by
bisection where its run begins and ends.

What came since the columns were made is kept beside them, in a dictionary of at most
``CHANGES_MAX`` locations, and merged when that is full: two sorted runs, in one pass. So a change
costs a microsecond, and now and then the time of a copy. While a merge runs the columns are there
twice, and a mask of them: below 50 bytes per location in all.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.ids import BLOCK_KEY_BYTES, BlockKey
from pdserve.kvstore.keys import split_keys

CHANGES_MAX = 16_384
NODES_MAX = 1 << 16

Keys = NDArray[np.uint64]
"""[n, 2]: the first and the last eight bytes of each key."""


def keys_from_bytes(joined: bytes | bytearray | memoryview) -> Keys:
    """Of keys that lie one behind the other."""
    assert len(joined) % BLOCK_KEY_BYTES == 0, f"{len(joined)} bytes of keys of {BLOCK_KEY_BYTES}"
    return np.frombuffer(joined, ">u8").astype(np.uint64).reshape(-1, 2)


def keys_to_list(keys: Keys) -> list[BlockKey]:
    return split_keys(keys.astype(">u8").tobytes())


class BlockIndex:
    """Nodes are numbers, given and reused by the caller."""

    def __init__(self, *, changes_max: int = CHANGES_MAX) -> None:
        assert changes_max > 0
        self._changes_max = changes_max
        self._first = np.empty(0, np.uint64)
        self._last = np.empty(0, np.uint64)
        self._node = np.empty(0, np.uint16)
        self._changes: dict[tuple[BlockKey, int], bool] = {}  # whether it is there now

    @property
    def nbytes(self) -> int:
        """Of the columns."""
        return self._first.nbytes + self._last.nbytes + self._node.nbytes

    def replace(self, node: int, keys: Keys) -> None:
        """``keys`` is all that this node has."""
        assert 0 <= node < NODES_MAX
        self._changes = {each: is_in for each, is_in in self._changes.items() if each[1] != node}
        self._keep(self._node != node)
        if len(keys):
            keys = keys[np.argsort(keys[:, 1])]
            rows, before = _misplaced(keys[:, 0], keys[:, 1])
            keys[rows] = keys[before]
            new = np.ones(len(keys), bool)
            new[1:] = np.any(keys[1:] != keys[:-1], axis=1)
            self._insert(keys[new], np.full(np.count_nonzero(new), node, np.uint16))

    def drop(self, node: int) -> None:
        """It has nothing, as far as anybody knows."""
        self.replace(node, np.empty((0, 2), np.uint64))

    def apply(self, node: int, added: Iterable[BlockKey], removed: Iterable[BlockKey]) -> None:
        """Idempotent: what is there may be added, what is not may be removed."""
        for keys, is_in in ((added, True), (removed, False)):
            for key in keys:
                self._changes[key, node] = is_in
        if len(self._changes) >= self._changes_max:
            self._merge()

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[tuple[int, ...]]:
        """Of each key, in ascending order; () where nobody has it."""
        found: list[set[int]] = [set() for _ in keys]
        wanted = keys_from_bytes(b"".join(keys))
        begins = np.searchsorted(self._last, wanted[:, 1], "left")
        ends = np.searchsorted(self._last, wanted[:, 1], "right")
        for position in np.flatnonzero(ends > begins):
            run = slice(begins[position], ends[position])
            same = self._first[run] == wanted[position, 0]
            found[position].update(self._node[run][same].tolist())
        if self._changes:
            nodes = {node for _, node in self._changes}
            for key, at in zip(keys, found, strict=True):
                for node in nodes:
                    is_in = self._changes.get((key, node))
                    if is_in is not None:
                        (at.add if is_in else at.discard)(node)
        return [tuple(sorted(at)) for at in found]

    def counts(self) -> Counter[int]:
        """Blocks by node. Linear in the index."""
        self._merge()
        counted = np.bincount(self._node)
        return Counter({int(node): int(counted[node]) for node in np.flatnonzero(counted)})

    def location_count(self) -> int:
        self._merge()
        return len(self._node)

    def block_count(self) -> int:
        """Those that several nodes have count once. Linear in the index."""
        self._merge()
        return int(np.count_nonzero(self._begins_run()))

    def only_at(self, node: int, *, besides: Iterable[int] = ()) -> list[BlockKey]:
        """What this node alone has; what only those ``besides`` have as well counts as alone."""
        self._merge()
        elsewhere = ~np.isin(self._node, np.array([node, *besides], np.uint16))
        run = np.cumsum(self._begins_run()) - 1
        is_elsewhere = np.zeros(int(run[-1]) + 1 if len(run) else 0, bool)
        is_elsewhere[run[elsewhere]] = True
        alone = (self._node == node) & ~is_elsewhere[run]
        return keys_to_list(np.stack((self._first[alone], self._last[alone]), axis=1))

    def check(self) -> None:
        """Assert the invariants; for tests."""
        order = np.lexsort((self._first, self._last))
        assert np.array_equal(order, np.arange(len(order))), "the columns are not in order"
        assert len(self._changes) < self._changes_max
        rows = np.stack((self._last, self._first, self._node.astype(np.uint64)), axis=1)
        assert len(np.unique(rows, axis=0)) == len(rows), "a location is there twice"

    def _begins_run(self) -> NDArray[np.bool_]:
        """Of each location, whether the one before it is of another block."""
        begins = np.ones(len(self._node), bool)
        begins[1:] = (self._last[1:] != self._last[:-1]) | (self._first[1:] != self._first[:-1])
        return begins

    def _merge(self) -> None:
        if not self._changes:
            return
        changes, self._changes = self._changes, {}
        keys = keys_from_bytes(b"".join(key for key, _ in changes))
        nodes = np.fromiter((node for _, node in changes), np.uint16, len(changes))
        is_in = np.fromiter(changes.values(), bool, len(changes))
        kept = np.ones(len(self._node), bool)
        # Whatever a change is about goes out first, and comes in again where it is there now.
        begins = np.searchsorted(self._last, keys[:, 1], "left")
        ends = np.searchsorted(self._last, keys[:, 1], "right")
        for position in np.flatnonzero(ends > begins):
            run = slice(begins[position], ends[position])
            kept[run] &= (self._first[run] != keys[position, 0]) | (
                self._node[run] != nodes[position]
            )
        self._keep(kept)
        order = np.argsort(keys[is_in, 1])
        self._insert(keys[is_in][order], nodes[is_in][order])

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        if not kept.all():
            self._first, self._last = self._first[kept], self._last[kept]
            self._node = self._node[kept]

    def _insert(self, keys: Keys, nodes: NDArray[np.uint16]) -> None:
        """Locations that are not there yet, in the order of their last halves."""
        places = np.searchsorted(self._last, keys[:, 1])
        first = np.insert(self._first, places, keys[:, 0])
        last = np.insert(self._last, places, keys[:, 1])
        self._node = np.insert(self._node, places, nodes)
        rows, before = _misplaced(first, last)
        first[rows], self._node[rows] = first[before], self._node[before]
        self._first, self._last = first, last


def _misplaced(
    first: NDArray[np.uint64], last: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Keys are in the order of their last halves. Those whose first halves are not: the places
    that they have together, and who belongs there. Hardly ever any: halves are hashes."""
    mixed = (last[1:] == last[:-1]) & (first[1:] != first[:-1])
    if not mixed.any():
        return np.empty(0, np.intp), np.empty(0, np.intp)
    rows = np.flatnonzero(np.isin(last, last[1:][mixed]))
    return rows, rows[np.lexsort((first[rows], last[rows]))]
