"""The supervisor of masters, as it is inside its actor: starts, starts again, ends."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from pdserve.cluster.kv_master import MasterFigures, master_report, move_away, show_master
from pdserve.cluster.master_supervisor import MasterSupervisor
from pdserve.config import StoreConfig
from pdserve.ids import StoreId
from pdserve.kvstore.masters.protocol import MasterReport
from tests.integration.store_masters import until


@pytest.mark.slow
def test_masters_are_started_again_and_end_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leading(addresses: list[str]) -> MasterReport:
        def ask() -> MasterReport | None:
            report = master_report(addresses)
            return report if report is not None and report.epoch else None

        return until(ask, "a leader")

    async def play() -> list[int]:
        supervisor = MasterSupervisor(0, 2, str(tmp_path / "s"), False, StoreConfig())
        try:
            addresses = await supervisor.ensure()
            assert len(addresses) == 2
            assert await supervisor.ensure() == addresses
            before = await asyncio.to_thread(leading, addresses)
            killed = set(await supervisor.pids())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(60):
                while len(set(await supervisor.pids()) - killed) < 2:
                    await asyncio.sleep(0.05)
            assert await supervisor.ensure() == addresses, "they are where they were"

            def next_leader() -> MasterReport | None:
                report = leading(addresses)
                return report if report.epoch > before.epoch else None

            after = await asyncio.to_thread(until, next_leader, "the next leader")
            show_master(addresses)
            move_away(addresses, StoreId("nobody"), 0.0)
            assert {family.name for family in MasterFigures(after).collect()} > {
                "pdserve_store_master_epoch",
                "pdserve_store_master_gaps",
            }
            return await supervisor.pids()
        finally:
            await supervisor.stop()

    pids = asyncio.run(play())
    said = capsys.readouterr().out
    assert "leads under epoch" in said
    assert "nobody is no member" in said
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    show_master(())
    assert capsys.readouterr().out == ""
