"""Which nodes have which blocks, of a whole cluster: sorted columns, no object per block. Pure.

A *location* is a pair of a block's key and a node's number. They lie in three columns of 18 bytes
together, in the order of the key's last eight bytes (the first ones are a tenant's, the same for
all of its keys), and of its first eight where those are equal. Whoever looks a key up finds by
bisection where its run begins and ends.

What came since the columns were made is kept beside them, in a dictionary of at most
``CHANGES_MAX`` locations, and merged when that is full: two sorted runs, in one pass. So a change
costs a microsecond, and now and then the time of a copy. A node that is dropped is only marked; its
locations go with the next merge.

Inventories, which are most of the work, come in by a *build*: from ``begin`` to ``finish`` the
columns stay as they are and are looked up in, and ``Build.run`` makes new ones from them, of all
inventories that wait at once, in any thread. At that time the columns are there twice, and a mask
of them: below 50 bytes per location in all.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Columns(NamedTuple):
    """Locations in order. Whoever has them may read them for as long as it likes: they are replaced
    as a whole, and never written to."""

    first: NDArray[np.uint64]
    last: NDArray[np.uint64]
    node: NDArray[np.uint16]


NOTHING = Columns(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint16))


@dataclass(frozen=True, slots=True)
class Build:
    """Columns to be made: pure data, and so for any thread."""

    columns: Columns
    gone: frozenset[int]  # nodes whose locations in there do not count
    inventories: Mapping[int, bytes | memoryview]  # by node: all that it has, joined, in no order

    @property
    def replaced(self) -> frozenset[int]:
        """Nodes of which nothing is taken over."""
        return self.gone.union(self.inventories)

    def run(self) -> Columns:
        """O(n log n) in the inventories, O(n) in the columns; numpy leaves the interpreter to other
        threads meanwhile."""
        kept = _without(self.columns, self.replaced)
        runs = [_run_of(node, keys_from_bytes(joined)) for node, joined in self.inventories.items()]
        return _joined(kept, *runs)


class BlockIndex:
    """Nodes are numbers, given and reused by the caller."""

    def __init__(self, *, changes_max: int = CHANGES_MAX) -> None:
        assert changes_max > 0
        self._changes_max = changes_max
        self._columns = NOTHING
        self._gone: set[int] = set()  # what the columns say of these does not count
        self._changes: dict[tuple[BlockKey, int], bool] = {}  # whether it is there now
        self._build: Build | None = None
        self._dropped_since: set[int] = set()  # since that was begun

    @property
    def nbytes(self) -> int:
        """Of the columns."""
        return sum(column.nbytes for column in self._columns)

    @property
    def is_building(self) -> bool:
        return self._build is not None

    def begin(self, inventories: Mapping[int, bytes | memoryview]) -> Build:
        """Whose result ``finish`` takes. Until then everything is answered as before; changes are
        kept beside the columns, and are the caller's to bound: one that waits needs none."""
        assert self._build is None, "one build at a time"
        assert all(0 <= node < NODES_MAX for node in inventories)
        self._dropped_since = set()
        self._build = Build(self._columns, frozenset(self._gone), inventories)
        return self._build

    def finish(self, made: Columns | None) -> None:
        """What the build made; None: it failed, and all stays as it was. Of nodes that were dropped
        since it began there is nothing; what else was said meanwhile of those whose inventories it
        has was said before they were asked, or will be said again."""
        build, self._build = self._build, None
        assert build is not None, "no build was begun"
        if made is not None:
            self._columns = made
            self._gone = set(self._dropped_since)
            self._changes = {
                each: is_in
                for each, is_in in self._changes.items()
                if each[1] not in build.inventories
            }
        self._merge_if_full()

    def replace(self, node: int, joined: bytes | memoryview) -> None:
        """These keys are all that this node has."""
        self.finish(self.begin({node: joined}).run())

    def drop(self, node: int) -> None:
        """It has nothing, as far as anybody knows."""
        assert 0 <= node < NODES_MAX
        self._changes = {each: is_in for each, is_in in self._changes.items() if each[1] != node}
        self._gone.add(node)
        self._dropped_since.add(node)

    def apply(self, node: int, added: Iterable[BlockKey], removed: Iterable[BlockKey]) -> None:
        """Idempotent: what is there may be added, what is not may be removed."""
        for keys, is_in in ((added, True), (removed, False)):
            for key in keys:
                self._changes[key, node] = is_in
        self._merge_if_full()

    def nodes_of(self, keys: Sequence[BlockKey]) -> list[tuple[int, ...]]:
        """Of each key, in ascending order; () where nobody has it."""
        found: list[set[int]] = [set() for _ in keys]
        wanted = keys_from_bytes(b"".join(keys))
        first, last, node_of = self._columns
        begins = np.searchsorted(last, wanted[:, 1], "left")
        ends = np.searchsorted(last, wanted[:, 1], "right")
        for position in np.flatnonzero(ends > begins):
            run = slice(begins[position], ends[position])
            same = first[run] == wanted[position, 0]
            found[position].update(set(node_of[run][same].tolist()) - self._gone)
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
        counted = np.bincount(self._settled().node)
        return Counter({int(node): int(counted[node]) for node in np.flatnonzero(counted)})

    def location_count(self) -> int:
        return len(self._settled().node)

    def block_count(self) -> int:
        """Those that several nodes have count once. Linear in the index."""
        return int(np.count_nonzero(_begins_run(self._settled())))

    def only_at(self, node: int, *, besides: Iterable[int] = ()) -> list[BlockKey]:
        """What this node alone has; what only those ``besides`` have as well counts as alone."""
        columns = self._settled()
        elsewhere = ~np.isin(columns.node, np.array([node, *besides], np.uint16))
        run = np.cumsum(_begins_run(columns)) - 1
        is_elsewhere = np.zeros(int(run[-1]) + 1 if len(run) else 0, bool)
        is_elsewhere[run[elsewhere]] = True
        alone = (columns.node == node) & ~is_elsewhere[run]
        return keys_to_list(np.stack((columns.first[alone], columns.last[alone]), axis=1))

    def check(self) -> None:
        """Assert the invariants; for tests."""
        first, last, node = self._columns
        order = np.lexsort((first, last))
        assert np.array_equal(order, np.arange(len(order))), "the columns are not in order"
        assert self.is_building or len(self._changes) < self._changes_max
        rows = np.stack((last, first, node.astype(np.uint64)), axis=1)
        assert len(np.unique(rows, axis=0)) == len(rows), "a location is there twice"

    def _merge_if_full(self) -> None:
        if len(self._changes) >= self._changes_max and not self.is_building:
            self._settled()

    def _settled(self) -> Columns:
        """All that is known, in columns; kept, unless a build goes on from the old ones."""
        if not self._changes and not self._gone:
            return self._columns
        merged = _merged(_without(self._columns, self._gone), self._changes)
        if not self.is_building:
            self._columns, self._gone, self._changes = merged, set(), {}
        return merged


def _begins_run(columns: Columns) -> NDArray[np.bool_]:
    """Of each location, whether the one before it is of another block."""
    begins = np.ones(len(columns.node), bool)
    begins[1:] = (columns.last[1:] != columns.last[:-1]) | (columns.first[1:] != columns.first[:-1])
    return begins


def _without(columns: Columns, nodes: Collection[int]) -> Columns:
    if not nodes:
        return columns
    return _kept(columns, ~np.isin(columns.node, np.array(sorted(nodes), np.uint16)))


def _kept(columns: Columns, kept: NDArray[np.bool_]) -> Columns:
    if kept.all():
        return columns
    return Columns(columns.first[kept], columns.last[kept], columns.node[kept])


def _run_of(node: int, keys: Keys) -> Columns:
    """A node's inventory, each key once."""
    last = np.ascontiguousarray(keys[:, 1])
    order = np.argsort(last)
    first, last = keys[:, 0].take(order), last.take(order)
    rows, before = _misplaced(first, last)
    first[rows] = first[before]
    run = Columns(first, last, np.full(len(keys), node, np.uint16))
    return _kept(run, _begins_run(run))


def _merged(columns: Columns, changes: Mapping[tuple[BlockKey, int], bool]) -> Columns:
    keys = keys_from_bytes(b"".join(key for key, _ in changes))
    nodes = np.fromiter((node for _, node in changes), np.uint16, len(changes))
    is_in = np.fromiter(changes.values(), bool, len(changes))
    kept = np.ones(len(columns.node), bool)
    # Whatever a change is about goes out first, and comes in again where it is there now.
    begins = np.searchsorted(columns.last, keys[:, 1], "left")
    ends = np.searchsorted(columns.last, keys[:, 1], "right")
    for position in np.flatnonzero(ends > begins):
        run = slice(begins[position], ends[position])
        kept[run] &= (columns.first[run] != keys[position, 0]) | (
            columns.node[run] != nodes[position]
        )
    order = np.flatnonzero(is_in)[np.argsort(keys[is_in, 1])]
    return _joined(_kept(columns, kept), Columns(keys[order, 0], keys[order, 1], nodes[order]))


def _joined(columns: Columns, *runs: Columns) -> Columns:
    """All of them, no location of which is in two, and each in the order of the last halves."""
    runs = tuple(run for run in (columns, *runs) if len(run.node))
    if len(runs) <= 1:
        return _ordered(runs[0]) if runs else NOTHING
    last = np.concatenate([run.last for run in runs])
    order = np.argsort(last, kind="stable")  # which finds runs and merges them
    return _ordered(
        Columns(
            np.concatenate([run.first for run in runs]).take(order),
            last.take(order),
            np.concatenate([run.node for run in runs]).take(order),
        )
    )


def _ordered(columns: Columns) -> Columns:
    """In the order of the first halves too, where the last ones are equal."""
    rows, before = _misplaced(columns.first, columns.last)
    if not len(rows):
        return columns
    first, node = columns.first.copy(), columns.node.copy()
    first[rows], node[rows] = columns.first[before], columns.node[before]
    return Columns(first, columns.last, node)


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
