"""Emptying a node: which chains go where, in which order, and what is left."""

from collections.abc import Sequence
from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.ids import BlockKey
from pdserve.kvstore.masters.core import Host
from pdserve.kvstore.masters.mastering import Copied, Remembered
from pdserve.kvstore.masters.replication import Copy, Holders
from pdserve.kvstore.masters.vacating import NO_PARENT, Chains, Vacating, ends_of
from tests.unit.kvstore.masters.test_replication import KEYS, host

TREE = Chains(
    {
        KEYS[0]: NO_PARENT,
        KEYS[1]: KEYS[0],
        KEYS[2]: KEYS[1],
        KEYS[3]: KEYS[1],  # a branch
        KEYS[4]: NO_PARENT,
        KEYS[6]: KEYS[5],  # its parent is gone
    }
)


def test_chains_to_what_is_there_alone() -> None:
    alone = [KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[6]]
    assert ends_of(TREE, alone) == [
        (KEYS[0], KEYS[1], KEYS[2]),
        (KEYS[0], KEYS[1], KEYS[3]),
        (KEYS[4],),
    ]
    assert ends_of(TREE, []) == []
    assert ends_of(Chains({KEYS[0]: KEYS[1], KEYS[1]: KEYS[0]}), [KEYS[0]]) == []


def test_what_is_worth_most_comes_first_and_of_equals_what_is_youngest() -> None:
    parents = dict.fromkeys(KEYS[:4], NO_PARENT)
    ages = [(9, 0.5), (3, 0.0), (7, 0.5), (1, 0.0)]
    remembered = {
        key: Remembered(age_ms, 0, worth) for key, (age_ms, worth) in zip(KEYS, ages, strict=False)
    }
    ends = ends_of(Chains(parents, remembered), KEYS[:4])
    assert [chain[0] for chain in ends] == [KEYS[2], KEYS[0], KEYS[3], KEYS[1]]


class Rig:
    """Targets that take a block into a free slot, or for one that is worth less: ``cold`` says how
    much those are worth that may go, the least first."""

    def __init__(self, tree: Chains, *targets: tuple[int, list[float]]) -> None:
        self.tree = tree
        self.source = host("s", 0, free=0, draining=True)
        self.targets = [
            host(f"t{index}", index + 1, free=free) for index, (free, _) in enumerate(targets)
        ]
        self.cold = {
            each.number: sorted(cold) for each, (_, cold) in zip(self.targets, targets, strict=True)
        }
        self.has: dict[int, set[BlockKey]] = {each.number: set() for each in self.targets}
        self.has[self.source.number] = set(tree.parents)
        self.gone: list[float] = []
        self.asked: list[int] = []

    @property
    def hosts(self) -> list[Host]:
        return [self.source, *self.targets]

    @property
    def holders(self) -> Holders:
        return lambda keys: [
            (each, count)
            for each in self.hosts
            if (count := len(list(takewhile(self.has[each.number].__contains__, keys))))
        ]

    def copy(self, copy: Copy) -> Copied:
        number, blocks = copy.target.number, 0
        self.asked.append(number)
        is_outweighed = False
        for index, key in enumerate(copy.keys):
            if key in self.has[number]:
                continue
            worth = max(each.worth for each in copy.remembered[index:])
            if copy.target.slots_free:
                copy.target.slots_free -= 1
            elif self.cold[number] and self.cold[number][0] < worth:
                self.gone.append(self.cold[number].pop(0))
            else:
                is_outweighed = True
                break
            self.has[number].add(key)
            blocks += 1
        present = len(list(takewhile(self.has[number].__contains__, copy.keys)))
        return Copied(blocks, present, is_outweighed)

    def drain(self, alone: Sequence[BlockKey]) -> Vacating:
        vacating = Vacating(self.source)
        vacating.begin(self.tree, alone)
        while (copy := vacating.next_copy(self.holders, self.hosts)) is not None:
            vacating.done(copy, self.copy(copy))
        return vacating

    def left(self) -> set[BlockKey]:
        return self.has[0].difference(*(self.has[each.number] for each in self.targets))


def flat(*worths: float) -> Chains:
    """Blocks that build on nothing."""
    keys = KEYS[: len(worths)]
    remembered = {key: Remembered(0, 0, worth) for key, worth in zip(keys, worths, strict=True)}
    return Chains(dict.fromkeys(keys, NO_PARENT), remembered)


def test_into_full_targets_goes_what_is_worth_more_than_what_they_have() -> None:
    rig = Rig(flat(5.0, 1.0, 4.0, 2.0), (0, [1.5, 3.0, 6.0]))
    vacating = rig.drain(KEYS[:4])
    assert (vacating.moved, rig.gone) == (2, [1.5, 3.0])
    assert rig.left() == vacating.outweighed == {KEYS[1], KEYS[3]}
    assert len(rig.asked) == 3, "who has refused one is asked for no lesser one"


def test_who_has_refused_is_asked_again_once_it_has_room() -> None:
    rig = Rig(flat(5.0, 1.0), (0, []))
    vacating = Vacating(rig.source)
    vacating.begin(rig.tree, KEYS[:1])
    copy = vacating.next_copy(rig.holders, rig.hosts)
    assert copy is not None
    vacating.done(copy, rig.copy(copy))
    assert vacating.next_copy(rig.holders, rig.hosts) is None
    rig.targets[0].slots_free = 1
    assert vacating.unseen(KEYS[:2]) == {KEYS[1]}
    vacating.begin(rig.tree, KEYS[:2])
    copy = vacating.next_copy(rig.holders, rig.hosts)
    assert copy is not None
    assert copy.keys == (KEYS[1],), "each block is tried once"


def test_what_comes_later_may_be_worth_more_than_what_was_refused() -> None:
    rig = Rig(flat(1.0, 5.0), (0, [2.0]))
    vacating = Vacating(rig.source)
    for alone in (KEYS[:1], KEYS[:2]):
        vacating.begin(rig.tree, alone)
        while (copy := vacating.next_copy(rig.holders, rig.hosts)) is not None:
            vacating.done(copy, rig.copy(copy))
    assert (rig.gone, rig.left(), vacating.outweighed) == ([2.0], {KEYS[0]}, {KEYS[0]})


def test_a_target_that_fails_or_refuses_leaves_it_to_the_next() -> None:
    rig = Rig(flat(5.0), (0, [6.0]), (0, [4.0]))
    assert rig.drain(KEYS[:1]).moved == 1
    assert rig.asked == [1, 2]
    rig = Rig(flat(5.0), (4, []), (3, []))
    vacating = Vacating(rig.source)
    vacating.begin(rig.tree, KEYS[:1])
    first = vacating.next_copy(rig.holders, rig.hosts)
    assert first is not None
    vacating.done(first, None)
    second = vacating.next_copy(rig.holders, rig.hosts)
    assert second is not None
    assert [each.target.number for each in (first, second)] == [1, 2]
    vacating.done(second, None)
    assert vacating.next_copy(rig.holders, rig.hosts) is None


def test_room_for_all_of_it_comes_before_a_prefix_that_is_there() -> None:
    rig = Rig(TREE, (2, []), (3, []))
    rig.has[1].add(KEYS[0])
    vacating = Vacating(rig.source)
    vacating.begin(TREE, [KEYS[1]])
    copy = vacating.next_copy(rig.holders, rig.hosts)
    assert copy is not None
    assert (copy.target.number, copy.blocks) == (1, 1), "both have room: who has most of it"
    rig.targets[0].slots_free = 0
    vacating = Vacating(rig.source)
    vacating.begin(TREE, [KEYS[1]])
    copy = vacating.next_copy(rig.holders, rig.hosts)
    assert copy is not None
    assert (copy.target.number, copy.blocks) == (2, 2)


def test_tenants_are_refused_one_by_one() -> None:
    tree = Chains(
        dict.fromkeys(KEYS[:2], NO_PARENT),
        {KEYS[0]: Remembered(0, 0, 2.0, 0), KEYS[1]: Remembered(0, 0, 1.0, 1)},
        ("a", "b"),
    )
    rig = Rig(tree, (0, []))
    assert rig.drain(KEYS[:2]).outweighed == {KEYS[0], KEYS[1]}
    assert rig.asked == [1, 1]


worths = st.lists(st.integers(0, 9).map(float), max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.integers(1, 7), st.integers(0, 6), max_size=7),
    st.lists(st.integers(0, 9), min_size=8, max_size=8),
    st.lists(st.tuples(st.integers(0, 8), worths), min_size=1, max_size=3),
)
def test_after_all_copies_nothing_is_alone_that_had_room_or_was_worth_more(
    parents: dict[int, int], values: list[int], targets: list[tuple[int, list[float]]]
) -> None:
    tree = {KEYS[0]: NO_PARENT}
    for child in sorted(parents):
        if parents[child] < child and KEYS[parents[child]] in tree:
            tree[KEYS[child]] = KEYS[parents[child]]
    remembered = {key: Remembered(0, 0, float(values[KEYS.index(key)])) for key in tree}
    chains = Chains(tree, remembered)
    rig = Rig(chains, *targets)
    assert set().union(*ends_of(chains, list(tree))) == set(tree)
    vacating = rig.drain(list(tree))
    left = rig.left()
    for key in vacating.outweighed & left:
        worth = max(remembered[other].worth for other in tree if key in chains.to(other))
        for each in rig.targets:
            free, cold = each.slots_free, rig.cold[each.number]
            has_parents = set(chains.to(key)[:-1]) <= rig.has[each.number]
            assert not has_parents or not free, "left, and there was room"
            assert not has_parents or not cold or cold[0] >= worth, "left, and worth more"
    if max(free for free, _ in targets) >= len(tree):
        assert not left
    assert len(rig.asked) <= len(targets) * len(tree)
    for each in rig.targets:
        for key in rig.has[each.number]:
            assert tree[key] == NO_PARENT or tree[key] in rig.has[each.number], "parents first"


def test_nothing_goes_where_nothing_is_taken() -> None:
    rig = Rig(flat(1.0))
    assert rig.drain(KEYS[:1]).moved == 0
