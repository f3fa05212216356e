"""Claims that a client makes by itself, and those that it leaves to the node."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.errors import FrameError
from pdserve.ids import BlockKey, SlotId
from pdserve.kvstore import local_reads, protocol
from pdserve.kvstore.hazards import ReaderBoard
from pdserve.kvstore.keys import split_keys
from pdserve.kvstore.lending import INDEX, PINS, Lending
from pdserve.kvstore.local_reads import ASKED_MAX, LocalReads
from pdserve.kvstore.shared_index import map_index
from pdserve.kvstore.slot_states import Slot, SlotState

SLOT_COUNT = 8
KEYS = [BlockKey(bytes([number + 1]) * 16) for number in range(SLOT_COUNT)]
NO_TAG = BlockKey(bytes(8) + b"x" * 8)


class Host:
    """What the node has lent to one client, and what that client has posted."""

    def __init__(self, directory: Path) -> None:
        (directory / "arena").write_bytes(b"")
        self.lending = Lending(
            directory / "arena", SLOT_COUNT, can_fence=lambda: True, fence=lambda: True
        )
        self.posted: list[tuple[bytes, ...]] = []
        with self.lending.lend(1, pins=True) as lent:
            self.index, self.board = map_index(lent[INDEX]), ReaderBoard(lent[PINS])

    def reads(self, *, has_lower_tier: bool = False) -> LocalReads:
        return LocalReads(self.index, self.board, self._post, has_lower_tier=has_lower_tier)

    def store(self, *keys: BlockKey) -> None:
        for slot, key in enumerate(keys):
            self.lending.note(SlotId(slot), Slot(SlotState.COMMITTED, generation=7 + slot, key=key))

    def held(self) -> set[int]:
        return set(self.lending._boards.held_of([SlotId(slot) for slot in range(SLOT_COUNT)]))

    def _post(self, message: object) -> bool:
        assert isinstance(message, protocol.Released)
        self.posted.append(message.asked)
        return True


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.lending.close()


def test_a_claim_holds_its_slots_until_its_release(host: Host) -> None:
    host.store(*KEYS[:3])
    reads = host.reads()
    found = reads.claim(KEYS[:4])
    assert found is not None
    grant, run = found
    assert (grant.slots, grant.generations, grant.has_tail) == ((0, 1, 2), (7, 8, 9), False)
    assert host.held() == {0, 1, 2}
    assert host.posted == []
    reads.release(run)
    reads.release(run)
    assert host.held() == set()
    assert host.posted == [(b"".join(KEYS[:4]),)]


def test_nothing_found_is_an_answer_that_the_node_hears_of_before_its_next_call(
    host: Host,
) -> None:
    reads = host.reads()
    found = reads.claim(KEYS[:2])
    assert found is not None
    assert found[0].slots == ()
    reads.release(found[1])
    assert host.posted == []
    reads.tell_asked()
    reads.tell_asked()
    assert host.posted == [(b"".join(KEYS[:2]),)]


def test_a_candidate_that_is_refuted_is_left_to_the_node(host: Host) -> None:
    host.store(*KEYS[:2])
    host.lending.hide([SlotId(1)])
    assert host.reads().claim(KEYS[:2]) is None
    assert host.held() == set()
    assert host.posted == []


def test_a_full_board_is_left_to_the_node(host: Host) -> None:
    host.store(*KEYS)
    reads = host.reads()
    assert reads.claim(KEYS) is None
    assert reads.claim(KEYS[: SLOT_COUNT // 2]) is not None
    assert reads.claim(KEYS[:1]) is None


def test_what_the_index_does_not_list_is_left_to_the_node(host: Host) -> None:
    host.store(KEYS[0])
    host.lending.note(SlotId(5), Slot(SlotState.COMMITTED, generation=1, key=NO_TAG))
    reads = host.reads()
    assert reads.claim([KEYS[0], KEYS[1]]) is None, "KEYS[1] might be the one that is not listed"
    assert reads.claim([KEYS[0]]) is not None


def test_what_a_disk_may_continue_is_left_to_the_node(host: Host) -> None:
    host.store(*KEYS[:2])
    reads = host.reads(has_lower_tier=True)
    assert reads.claim(KEYS[:3]) is None
    assert reads.claim(KEYS[:2]) is not None


@pytest.mark.parametrize(
    "keys", [[], [BlockKey(b"short")], [BlockKey(bytes(8)), BlockKey(bytes(24))]]
)
def test_what_is_no_chain_of_keys_is_left_to_the_node(host: Host, keys: list[BlockKey]) -> None:
    assert host.reads().claim(keys) is None


def test_the_node_hears_of_many_prompts_at_once_and_soon_enough(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = host.reads()
    for _ in range(ASKED_MAX):
        reads.claim(KEYS[:1])
    assert host.posted == [(KEYS[0],) * ASKED_MAX]
    monkeypatch.setattr(local_reads, "ASKED_BYTES_MAX", 40)
    reads.claim(KEYS[:2])
    reads.claim(KEYS[:2])
    assert host.posted[1:] == [(b"".join(KEYS[:2]),) * 2]


def test_keys_in_one_piece_are_taken_apart_or_refused() -> None:
    assert split_keys(b"".join(KEYS)) == KEYS
    assert split_keys(b"") == []
    with pytest.raises(FrameError, match="17 bytes of keys that have 16 each"):
        split_keys(bytes(17))
