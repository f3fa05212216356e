"""The index against a plain dictionary, with keys that share halves as hashes never would."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.ids import BlockKey
from pdserve.kvstore.block_index import BlockIndex, keys_from_bytes, keys_to_list

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

    @rule(node=nodes, keys=key_lists)
    def replace(self, node: int, keys: list[BlockKey]) -> None:
        self.index.replace(node, keys_from_bytes(b"".join(keys)))
        self.model[node] = set(keys)

    @rule(node=nodes, added=key_lists, removed=key_lists)
    def apply(self, node: int, added: list[BlockKey], removed: list[BlockKey]) -> None:
        self.index.apply(node, added, removed)
        self.model[node] = (self.model[node] | set(added)) - set(removed)

    @rule(node=nodes)
    def drop(self, node: int) -> None:
        self.index.drop(node)
        self.model[node] = set()

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
    index.replace(3, keys_from_bytes(b"".join(KEYS)))
    assert index.nbytes == 18 * len(KEYS)
