"""What a loop says when the router that it reports to is another one."""

import pytest

from pdserve.engine import blocks
from pdserve.engine.outputs import GiveUp
from pdserve.ids import BlockKey
from tests.unit.engine.rig import Rig, prompt, request


def test_a_new_router_hears_of_all_that_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    loop = rig.decode(chunk_tokens=8)
    rig.send(request(tokens=prompt(30)), prefill="d0", decode="d0")
    rig.run()
    before = set(loop._device.pool._block_of)
    assert before
    loop.load()
    assert loop.load().blocks_added == ()
    monkeypatch.setattr(blocks, "CHANGES_AT_ONCE", 2)
    loop.handle(GiveUp())
    told: list[BlockKey] = []
    while loop.busy():
        loop.step()
        told += loop.load().blocks_added
    assert len(told) == len(before) > 2
    assert set(told) == before
