"""What a master knows, against what nodes have: deltas, gaps, losses, restarts, old answers."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.errors import FrameError, StaleEpoch
from pdserve.ids import BlockKey, HostId, StoreId
from pdserve.kvstore.feed import ChangeFeed
from pdserve.kvstore.masters.block_index import BlockIndex, Build
from pdserve.kvstore.masters.core import EVERYTHING, MasterCore, prefix_counts
from pdserve.kvstore.masters.mastering import Deltas
from pdserve.kvstore.masters.metadata import Member
from pdserve.messages import Address

KEYS = [BlockKey(bytes([index]) * 16) for index in range(6)]
NAMES = [StoreId(name) for name in ("a", "b", "c")]
FEED_MAX = 4


def member(name: str, epoch: int) -> Member:
    return Member(StoreId(name), Address(HostId("h"), f"/{name}", ""), epoch)


@dataclass
class Node:
    """What a node has, and how it answers."""

    member: Member
    blocks: set[BlockKey] = field(default_factory=set)
    feed: ChangeFeed = field(default_factory=lambda: ChangeFeed(changes_max=FEED_MAX))

    def change(self, key: BlockKey) -> None:
        self.feed.note(key, key not in self.blocks)
        self.blocks ^= {key}

    def answer(self, after: int) -> tuple[Deltas, bytes]:
        changes = self.feed.since(after)
        added, removed = (sorted(self.blocks), []) if changes is None else changes
        deltas = answer_of(
            self.member.epoch,
            after,
            self.feed.sequence,
            is_whole=changes is None,
            added=len(added),
            removed=len(removed),
        )
        return deltas, b"".join((*added, *removed))


def answer_of(
    epoch: int, after: int, sequence: int, *, is_whole: bool, added: int, removed: int = 0
) -> Deltas:
    return Deltas(
        epoch=epoch,
        after=after,
        sequence=sequence,
        is_whole=is_whole,
        added=added,
        removed=removed,
        slots_free=3,
        block_bytes=8,
        codec=0,
        is_draining=False,
    )


names = st.sampled_from(NAMES)


class MasterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.nodes: dict[StoreId, Node] = {}
        self.on_their_way: list[tuple[StoreId, Deltas, bytes]] = []
        self.master = MasterCore(BlockIndex(changes_max=3))
        self.build: Build | None = None

    def _members(self) -> list[Member]:
        return [node.member for node in self.nodes.values()]

    @rule(name=names)
    def start_or_replace(self, name: StoreId) -> None:
        """A process that begins empty; or one that was taken for dead and keeps what it has."""
        self.epoch += 1
        self.nodes[name] = Node(member(name, self.epoch))

    @rule(name=names)
    def join_again(self, name: StoreId) -> None:
        if name in self.nodes:
            self.epoch += 1
            self.nodes[name].member = member(name, self.epoch)

    @rule(name=names)
    def die(self, name: StoreId) -> None:
        self.nodes.pop(name, None)

    @rule(name=names, keys=st.lists(st.sampled_from(KEYS), max_size=2 * FEED_MAX))
    def change(self, name: StoreId, keys: list[BlockKey]) -> None:
        if name in self.nodes:
            for key in keys:
                self.nodes[name].change(key)

    @rule()
    def read_the_table(self) -> None:
        turnover = self.master.set_members(self._members())
        assert self.master.set_members(self._members()).joined == ()
        assert not set(turnover.joined) & set(turnover.left)

    @rule(name=names, after=st.integers(-1, 6))
    def answer(self, name: StoreId, after: int) -> None:
        """To a question of now, or to one that another master asked."""
        if name in self.nodes:
            host = self.master.host(name)
            asked = after if host is None else host.sequence
            self.on_their_way.append((name, *self.nodes[name].answer(asked)))

    @precondition(lambda self: self.on_their_way and self.build is None)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """In whatever order, and twice."""
        name, deltas, body = data.draw(st.sampled_from(self.on_their_way))
        host = self.master.host(name)
        is_current = host is not None and host.member.epoch == deltas.epoch
        try:
            self.master.take(name, deltas, body)
        except StaleEpoch:
            assert not is_current
        else:
            assert is_current

    @precondition(lambda self: self.build is None)
    @rule()
    def begin(self) -> None:
        """Of what every node has now, as a new master does; they change, die and join meanwhile."""
        for name, node in self.nodes.items():
            host = self.master.host(name)
            if host is not None and host.member == node.member:
                self.master.hold(name, *node.answer(EVERYTHING))
                assert self.master.is_held(name)
        self.build = self.master.begin()

    @precondition(lambda self: self.build is not None)
    @rule(fails=st.booleans())
    def finish(self, fails: bool) -> None:
        self._finish(fails=fails)

    def _finish(self, *, fails: bool = False) -> None:
        if self.build is not None:
            self.master.finish(None if fails else self.build.run())
        self.build = None

    @rule(name=names)
    def lose(self, name: StoreId) -> None:
        self.master.lost(name)

    @invariant()
    def only_those_heard_have_anything(self) -> None:
        heard = {host.number for host in self.master.hosts if host.is_in}
        assert set(self.master.index.counts()) <= heard

    @rule()
    def die_and_be_succeeded(self) -> None:
        self.master, self.build = MasterCore(BlockIndex(changes_max=3)), None
        assert not self.master.is_whole

    @rule()
    def catch_up(self) -> None:
        """Everybody is asked until there is no gap; then the index is all that is there."""
        self.on_their_way.clear()
        self._finish()
        self.master.set_members(self._members())
        for name, node in self.nodes.items():
            for _ in range(2):
                host = self.master.host(name)
                assert host is not None
                if self.master.take(name, *node.answer(host.sequence)):
                    break
            else:
                raise AssertionError("a gap after everything was told")
        assert self.master.is_whole
        self._compare(self.nodes.values())

    def _compare(self, those: Iterable[Node]) -> None:
        self.master.index.check()
        found = self.master.index.nodes_of(KEYS)
        number_of = {}
        for node in those:
            host = self.master.host(node.member.store_id)
            assert host is not None
            number_of[node.member.store_id] = host.number
        for key, at in zip(KEYS, found, strict=True):
            expected = {number_of[n.member.store_id] for n in those if key in n.blocks}
            assert set(at) == expected


MasterMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestMaster = MasterMachine.TestCase


def test_an_answer_under_an_old_epoch_is_refused_and_counted() -> None:
    core = MasterCore()
    core.set_members([member("a", 5)])
    old = Node(member("a", 4), set(KEYS))
    with pytest.raises(StaleEpoch, match="speaks under epoch 4, the member has 5"):
        core.take(StoreId("a"), *old.answer(EVERYTHING))
    with pytest.raises(StaleEpoch, match="has none"):
        core.take(StoreId("gone"), *old.answer(EVERYTHING))
    assert core.counters["fenced"] == 2
    assert core.index.nodes_of(KEYS[:1]) == [()]


def test_who_leaves_or_begins_anew_takes_its_locations_along() -> None:
    core = MasterCore()
    core.set_members([member("a", 1), member("b", 1)])
    for name in ("a", "b"):
        assert core.take(StoreId(name), *Node(member(name, 1), set(KEYS)).answer(EVERYTHING))
    turnover = core.set_members([member("b", 2), member("c", 1)])
    assert turnover.left == (member("a", 1), member("b", 1))
    assert turnover.joined == (member("b", 2), member("c", 1))
    assert core.index.location_count() == 0
    assert core.holders(KEYS) == []


def test_a_gap_forgets_the_node_and_asks_for_everything() -> None:
    core = MasterCore()
    core.set_members([member("a", 1)])
    node = Node(member("a", 1), set(KEYS))
    assert core.take(StoreId("a"), *node.answer(EVERYTHING))
    ahead = answer_of(1, 3, 4, is_whole=False, added=0)
    assert not core.take(StoreId("a"), ahead, b"")
    host = core.host(StoreId("a"))
    assert host is not None
    assert (host.sequence, core.counters["gaps"], core.is_whole) == (EVERYTHING, 1, False)


def test_an_inventory_counts_when_its_build_is_done_and_its_node_is_still_the_same() -> None:
    core = MasterCore()
    core.set_members([member("a", 1), member("b", 1)])
    for name in ("a", "b"):
        core.hold(StoreId(name), *Node(member(name, 1), set(KEYS)).answer(EVERYTHING))
    build = core.begin()
    assert not core.is_held(StoreId("a"))
    core.set_members([member("a", 1), member("b", 2)])
    core.finish(build.run())
    assert [(host.member.store_id, count) for host, count in core.holders(KEYS)] == [("a", 6)]
    assert not core.is_whole
    core.hold(StoreId("b"), *Node(member("b", 2), set(KEYS)).answer(EVERYTHING))
    core.begin()
    core.finish(None)
    assert not core.is_whole, "it failed: everything is to be asked again"


@pytest.mark.parametrize(("added", "removed"), [(2, 0), (-1, 2), (0, 0), (1, 1)])
def test_a_body_that_is_not_what_was_said_is_refused(added: int, removed: int) -> None:
    core = MasterCore()
    core.set_members([member("a", 1)])
    deltas = replace(answer_of(1, -1, 0, is_whole=True, added=added), removed=removed)
    with pytest.raises(FrameError, match="16 bytes for"):
        core.take(StoreId("a"), deltas, KEYS[0])


def test_who_has_most_of_a_chain_comes_first_and_who_drains_last() -> None:
    core = MasterCore()
    core.set_members([member(name, 1) for name in ("a", "b", "c", "d")])
    for name, count, draining in (
        ("a", 2, False),
        ("b", 4, True),
        ("c", 3, False),
        ("d", 0, False),
    ):
        deltas = replace(answer_of(1, -1, 0, is_whole=True, added=count), is_draining=draining)
        assert core.take(StoreId(name), deltas, b"".join(KEYS[:count]))
    found = [(host.member.store_id, count) for host, count in core.holders(KEYS)]
    assert found == [("c", 3), ("a", 2), ("b", 4)]
    assert core.only_at(StoreId("b")) == [KEYS[3]]
    assert core.only_at(StoreId("gone")) == []


def test_a_prefix_ends_where_a_block_is_missing() -> None:
    assert prefix_counts([]) == {}
    assert prefix_counts([(1, 2), (2,), (1, 2)]) == {1: 1, 2: 3}
    assert prefix_counts([(), (1,)]) == {}
