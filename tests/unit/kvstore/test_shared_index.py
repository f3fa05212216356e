"""The index in shared memory: what the node lists is found, and nothing else is ever confirmed."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.errors import StoreUnavailable
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore.shared_index import (
    LANES,
    NEIGHBOURS,
    PIECE_KEYS,
    IndexReader,
    SharedIndex,
    create_index,
    map_index,
)
from pdserve.kvstore.slot_states import Slot, SlotState


def key(number: int, home: int = 1) -> BlockKey:
    """``home`` is its tag."""
    return BlockKey(home.to_bytes(8, "little") + number.to_bytes(8, "little"))


def committed(which: BlockKey, generation: int = 1) -> Slot:
    return Slot(state=SlotState.COMMITTED, generation=generation, key=which)


def index_of(directory: Path, slot_count: int) -> tuple[SharedIndex, IndexReader]:
    index = create_index(directory / "index", slot_count)
    descriptor = os.open(directory / "index", os.O_RDONLY)
    try:
        return index, map_index(descriptor)
    finally:
        os.close(descriptor)


def found(reader: IndexReader, *keys: BlockKey) -> list[int]:
    """The slots of the prefix that is found and confirmed."""
    joined = b"".join(keys)
    slots = reader.lookup(joined)
    assert reader.confirm(slots, joined) is not None, "nothing has changed in between"
    return [int(slot) for slot in slots]


def test_a_prefix_is_found_as_far_as_it_goes(tmp_path: Path) -> None:
    index, reader = index_of(tmp_path, 100)
    keys = [key(number, home=number + 1) for number in range(60)]
    for number, each in enumerate(keys):
        index.note(SlotId(99 - number), committed(each, generation=number + 1))
    joined = b"".join(keys)
    assert found(reader, *keys) == [99 - number for number in range(60)]
    generations = reader.confirm(reader.lookup(joined), joined)
    assert generations is not None
    assert generations.tolist() == list(range(1, 61))
    index.note(SlotId(99 - 40), Slot(state=SlotState.DRAINING, generation=41, key=keys[40]))
    assert found(reader, *keys) == [99 - number for number in range(40)]
    assert found(reader, *keys[41:]) == [99 - number for number in range(41, 60)]
    assert found(reader, keys[40]) == []


@pytest.mark.parametrize("state", [state for state in SlotState if state != SlotState.COMMITTED])
def test_only_what_is_committed_is_found(tmp_path: Path, state: SlotState) -> None:
    index, reader = index_of(tmp_path, 4)
    index.note(SlotId(2), committed(key(0)))
    index.note(SlotId(2), Slot(state=state, generation=1, key=key(0)))
    assert found(reader, key(0)) == []


def test_blocks_of_a_full_bucket_lie_beside_it_and_then_are_the_nodes_alone(
    tmp_path: Path,
) -> None:
    room = LANES * (NEIGHBOURS + 1)
    index, reader = index_of(tmp_path, 400)
    keys = [key(number, home=7) for number in range(room + 2)]
    # All have one tag, so a lookup of one of them alone gives some of the others, and is refuted.
    for number, each in enumerate(keys):
        index.note(SlotId(number), committed(each))
    assert reader.unlisted_count == 2
    index.note(SlotId(room), Slot(SlotState.FREE, generation=1))
    assert reader.unlisted_count == 1
    for number in range(room):
        index.note(SlotId(number), Slot(SlotState.FREE, generation=1))
    assert found(reader, keys[0]) == []
    other = [key(number, home=7 + 1000 * 150) for number in range(1)]  # the same bucket of 150
    index.note(SlotId(0), committed(other[0], generation=2))
    assert found(reader, *other) == [0]


@pytest.mark.parametrize("spilt_at", [0, 5, 19])
def test_a_block_beside_its_bucket_is_found_within_a_prefix(tmp_path: Path, spilt_at: int) -> None:
    index, reader = index_of(tmp_path, 100)  # 38 buckets
    for number in range(LANES):
        index.note(SlotId(80 + number), committed(key(0, home=3 + 38 * (100 + number))))
    keys = [key(number, home=4 + 38 * number) for number in range(20)]
    keys[spilt_at] = key(1, home=3)
    for number, each in enumerate(keys):
        index.note(SlotId(number), committed(each))
    assert reader.unlisted_count == 0
    assert found(reader, *keys) == list(range(20))
    index.note(SlotId(spilt_at), Slot(SlotState.FREE))
    assert found(reader, *keys) == list(range(spilt_at))


def test_a_long_prompt_is_looked_up_in_pieces(tmp_path: Path) -> None:
    count = 2 * PIECE_KEYS + 3
    index, reader = index_of(tmp_path, count)
    keys = [key(number, home=number + 1) for number in range(count)]
    for number in range(count - 1):
        index.note(SlotId(number), committed(keys[number]))
    assert found(reader, *keys) == list(range(count - 1))
    index.note(SlotId(PIECE_KEYS), Slot(SlotState.FREE))
    assert found(reader, *keys) == list(range(PIECE_KEYS))


def test_a_hidden_block_is_a_candidate_that_is_refuted(tmp_path: Path) -> None:
    index, reader = index_of(tmp_path, 4)
    index.note(SlotId(1), committed(key(5)))
    index.hide([SlotId(1)])
    slots = reader.lookup(key(5))
    assert slots.tolist() == [1]
    assert reader.confirm(slots, key(5)) is None
    index.note(SlotId(1), Slot(SlotState.RESERVED, generation=2))
    index.note(SlotId(1), committed(key(6, home=2), generation=2))
    assert reader.confirm(slots, key(5)) is None, "another block is there now"
    assert found(reader, key(6, home=2)) == [1]


def test_a_tag_of_nothing_is_found_by_asking(tmp_path: Path) -> None:
    index, reader = index_of(tmp_path, 4)
    index.note(SlotId(1), committed(key(5, home=0)))
    assert reader.unlisted_count == 1
    slots = reader.lookup(key(5, home=0))
    assert reader.confirm(slots, key(5, home=0)) is None or slots.tolist() == [1]


def test_the_file_is_its_owners_and_what_is_none_is_refused(tmp_path: Path) -> None:
    index_of(tmp_path, 4)
    assert (tmp_path / "index").stat().st_mode & 0o777 == 0o600
    (tmp_path / "other").write_bytes(b"something else" * 400)
    descriptor = os.open(tmp_path / "other", os.O_RDONLY)
    with pytest.raises(StoreUnavailable, match="run one release everywhere"):
        map_index(descriptor)
    os.close(descriptor)


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, 11), st.integers(0, 15), st.sampled_from(["commit", "free", "hide"])
        ),
        max_size=60,
    ),
    asked=st.lists(st.integers(0, 15), min_size=1, max_size=8, unique=True),
)
def test_it_finds_what_a_dictionary_finds(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, int, str]],
    asked: list[int],
) -> None:
    """Keys of few tags crowd in few buckets; the dictionary is the model."""
    index, reader = index_of(tmp_path_factory.mktemp("index"), 12)
    model: dict[int, int] = {}  # number of a key -> slot
    hidden: set[int] = set()
    generations = [0] * 12
    for slot, number, what in changes:
        held = next((each for each, place in model.items() if place == slot), None)
        if what == "commit" and held is None and number not in model and slot not in hidden:
            generations[slot] += 1
            index.note(SlotId(slot), committed(key(number, 5 * number + 1), generations[slot]))
            model[number] = slot
        elif what == "hide" and held is not None:
            index.hide([SlotId(slot)])
            hidden.add(slot)
            del model[held]
        elif what == "free":
            index.note(SlotId(slot), Slot(SlotState.FREE, generation=generations[slot]))
            hidden.discard(slot)
            if held is not None:
                del model[held]
    assert reader.unlisted_count == 0
    joined = b"".join(key(number, 5 * number + 1) for number in asked)
    slots = reader.lookup(joined)
    confirmed = reader.confirm(slots, joined)
    expected = []
    for number in asked:
        if number not in model:
            break
        expected.append(model[number])
    if confirmed is None:
        assert set(slots.tolist()) & hidden, "only what is hidden may be refuted"
    else:
        assert slots.tolist() == expected
        assert confirmed.tolist() == [generations[slot] for slot in expected]
    assert slots.dtype == np.uint32
