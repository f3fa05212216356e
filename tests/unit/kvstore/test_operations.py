"""The shell's part of running a store, without a socket."""

import asyncio
from pathlib import Path

import pytest

from pdserve.errors import CapacityError, FrameError
from pdserve.ids import StoreId
from pdserve.kvstore import admin
from pdserve.kvstore.arena import Geometry, create_arena
from pdserve.kvstore.core import StoreCore
from pdserve.kvstore.operations import LIFETIME_MS_MAX, Operations
from pdserve.kvstore.phases import PhaseTimes
from pdserve.kvstore.tickets import RETRY_AFTER_MS


@pytest.fixture
def operations(tmp_path: Path) -> Operations:
    core = StoreCore(8)
    arena = create_arena(tmp_path / "arena", Geometry(8, 64), StoreId("s"))
    return Operations(core, arena, None, clock=lambda: 0, settle=core.take_changed_slots)


def test_one_audit_at_a_time(operations: Operations) -> None:
    async def two() -> None:
        first = asyncio.create_task(operations.audit(None))
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="under way") as refused:
            await operations.audit(None)
        assert refused.value.retry_after_ms == RETRY_AFTER_MS
        assert (await first).findings == ()
        assert (await operations.audit(None)).slots == 8

    asyncio.run(two())


@pytest.mark.parametrize("lifetime_ms", [0, -1, LIFETIME_MS_MAX + 1])
def test_a_pin_without_a_sensible_time_is_refused(operations: Operations, lifetime_ms: int) -> None:
    with pytest.raises(FrameError, match=f"a pin of {lifetime_ms} ms"):
        operations.decide(admin.PinPrefix((), hard=False, lifetime_ms=lifetime_ms))


def test_what_is_no_message_for_a_node_is_refused(operations: Operations) -> None:
    with pytest.raises(FrameError, match="Counted is not for a store node"):
        operations.decide(admin.Counted(1))
    times = PhaseTimes("sleep", "memory", (), 0)
    with pytest.raises(FrameError, match="broken counts"):
        operations.decide(admin.NotePhases((times,)))
