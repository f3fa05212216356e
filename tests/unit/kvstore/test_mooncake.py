"""Memory that a one-sided transfer may touch is not used again before it has ended."""

from collections.abc import Callable

import pytest

from pdserve.errors import ChecksumMismatch, DeadlineExceeded, StoreUnavailable
from pdserve.kvstore import mooncake
from pdserve.kvstore.mooncake import OneSidedEngine, Staging


class FakeEngine(OneSidedEngine):
    """Transfers end when a test says so."""

    def __init__(self) -> None:
        self.segment = "here:1"
        self.registered: set[int] = set()
        self.begun: list[tuple[int, int, int]] = []
        self.ends: dict[int, bool | None] = {}

    def register(self, address: int, size: int) -> None:
        self.registered.add(address)

    def unregister(self, address: int) -> None:
        self.registered.remove(address)

    def begin(self, segment: str, local: int, remote: int, size: int) -> int:
        self.begun.append((local, remote, size))
        transfer = len(self.begun)
        self.ends.setdefault(transfer, True)
        return transfer

    def has_ended(self, transfer: int) -> bool | None:
        return self.ends[transfer]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr(mooncake, "_kept", [])
    return FakeEngine()


def gives_up() -> None:
    raise DeadlineExceeded("0 s have passed")


def never() -> None:
    raise AssertionError("nothing was waited for")


def test_pieces_go_to_their_places(engine: FakeEngine) -> None:
    staging = Staging(engine, 4096)
    staging.read("there:1", [(0, 70, 10), (100, 90, 20)], never)
    assert engine.begun == [(staging.address, 70, 10), (staging.address + 100, 90, 20)]
    assert staging.is_free()
    staging.close()
    assert engine.registered == set()


def test_memory_given_up_is_taken_until_the_transfer_has_ended(engine: FakeEngine) -> None:
    staging = Staging(engine, 4096)
    engine.ends[2] = None
    with pytest.raises(DeadlineExceeded):
        staging.read("there:1", [(0, 0, 10), (10, 0, 10)], gives_up)
    assert not staging.is_free()
    engine.ends[2] = False
    assert staging.is_free()


def test_memory_that_may_be_touched_outlives_its_client(engine: FakeEngine) -> None:
    staging = Staging(engine, 4096)
    engine.ends[1] = None
    with pytest.raises(DeadlineExceeded):
        staging.read("there:1", [(0, 0, 10)], gives_up)
    staging.close()
    assert engine.registered == {staging.address}
    assert mooncake._kept == [staging]


def test_a_transfer_that_breaks_off_is_said_when_all_have_ended(engine: FakeEngine) -> None:
    staging = Staging(engine, 4096)
    engine.ends[1] = False
    with pytest.raises(StoreUnavailable, match="1 of 2 transfers"):
        staging.read("there:1", [(0, 0, 10), (10, 0, 10)], never)
    assert staging.is_free()


@pytest.mark.parametrize(
    ("error", "is_free"), [(ChecksumMismatch, True), (StoreUnavailable, False)]
)
def test_memory_lent_to_who_does_not_answer_stays_lent(
    engine: FakeEngine, error: Callable[[str], Exception], is_free: bool
) -> None:
    staging = Staging(engine, 4096)

    def fail() -> None:
        with staging.lent():
            assert not staging.is_free()
            raise error("from the node")

    with pytest.raises((ChecksumMismatch, StoreUnavailable)):
        fail()
    assert staging.is_free() is is_free
