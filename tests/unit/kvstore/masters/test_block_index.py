"""The index against a plain dictionary, with keys that share halves as hashes never would."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.ids import BlockKey
from pdserve.kvstore.masters.block_index import BlockIndex, Build, keys_from_bytes, keys_to_list

KEYS = [
    BlockKey(first * 8 + last * 8) for first in (b"\0", b"\1", b"\xff") for last in (b"\0", b"\x80")
]
"""Several of each half."""

NODES = (0, 1, 7)

key_lists = st.lists(st.sampled_from(KEYS), max_size=8)
nodes = st.sampled_from(NODES)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = BlockIndex(changes_max=5)  # so that merges happen
        self.model: dict[int, set[BlockKey]] = {node: set() for node in NODES}
        self.build: Build | None = None
        self.coming: dict[int, set[BlockKey]] = {}  # with the build, unless dropped before

    @precondition(lambda self: self.build is None)
    @rule(node=nodes, keys=key_lists)
    def replace(self, node: int, keys: list[BlockKey]) -> None:
        self.index.replace(node, b"".join(keys))
        self.model[node] = set(keys)

    @precondition(lambda self: self.build is None)
    @rule(inventories=st.dictionaries(nodes, key_lists))
    def begin(self, inventories: dict[int, list[BlockKey]]) -> None:
        self.build = self.index.begin({n: b"".join(keys) for n, keys in inventories.items()})
        self.coming = {node: set(keys) for node, keys in inventories.items()}

    @precondition(lambda self: self.build is not None)
    @rule(fails=st.booleans())
    def finish(self, fails: bool) -> None:
        assert self.build is not None
        self.index.finish(None if fails else self.build.run())
        if not fails:
            self.model |= self.coming
        self.build = None

    @rule(node=nodes, added=key_lists, removed=key_lists)
    def apply(self, node: int, added: list[BlockKey], removed: list[BlockKey]) -> None:
        self.index.apply(node, added, removed)
        self.model[node] = (self.model[node] | set(added)) - set(removed)

    @rule(node=nodes)
    def drop(self, node: int) -> None:
        self.index.drop(node)
        self.model[node] = set()
        if self.build is not None and node in self.coming:
            self.coming[node] = set()

    @rule(node=nodes, besides=st.lists(nodes))
    def only_at(self, node: int, besides: list[int]) -> None:
        others = [self.model[each] for each in NODES if each not in (node, *besides)]
        expected = self.model[node].difference(*others)
        found = self.index.only_at(node, besides=besides)
        assert len(found) == len(set(found))
        assert set(found) == expected

    @rule()
    def count(self) -> None:
        assert self.index.location_count() == sum(map(len, self.model.values()))
        assert self.index.block_count() == len(set().union(*self.model.values()))
        counts = {node: len(keys) for node, keys in self.model.items() if keys}
        assert dict(self.index.counts()) == counts

    @invariant()
    def every_lookup_agrees(self) -> None:
        self.index.check()
        expected = [tuple(node for node in NODES if key in self.model[node]) for key in KEYS]
        assert self.index.nodes_of(KEYS) == expected


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestIndex = IndexMachine.TestCase


def test_keys_survive_both_ways() -> None:
    assert keys_to_list(keys_from_bytes(b"".join(KEYS))) == KEYS
    assert BlockIndex().nodes_of([]) == []


def test_a_location_takes_eighteen_bytes() -> None:
    index = BlockIndex()
    index.replace(3, b"".join(KEYS))
    assert index.nbytes == 18 * len(KEYS)


def test_inventories_of_many_nodes_are_one_build() -> None:
    """Among them keys that several have, and a node that has nothing any more."""
    index = BlockIndex()
    index.replace(9, KEYS[0])
    build = index.begin({node: b"".join(KEYS[node:]) for node in range(len(KEYS))} | {9: b""})
    assert index.nodes_of(KEYS[:2]) == [(9,), ()], "nothing changes before it is finished"
    index.finish(build.run())
    index.check()
    assert index.nodes_of(KEYS) == [tuple(range(n + 1)) for n in range(len(KEYS))]


def test_what_was_dropped_while_a_build_ran_does_not_come_back_with_it() -> None:
    index = BlockIndex()
    index.replace(1, KEYS[0])
    build = index.begin({0: KEYS[1]})
    index.drop(0)
    index.drop(1)
    index.finish(build.run())
    assert index.nodes_of(KEYS[:2]) == [(), ()]
    assert index.location_count() == 0
    index.replace(1, KEYS[1])
    assert index.nodes_of(KEYS[:2]) == [(), (1,)]
