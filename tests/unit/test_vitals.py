"""What a process has of the machine: the figures, and that nobody looks too often."""

import asyncio
from pathlib import Path

from pdserve.clock import MS
from pdserve.vitals import LOOK_NS, Vitals


def machine(proc: Path, *, pages: int, fds: int) -> None:
    (proc / "fd").mkdir(parents=True, exist_ok=True)
    (proc / "statm").write_text(f"999 {pages} 3 4 0 5 0\n")
    for number in range(fds):
        (proc / "fd" / str(number)).touch()


def test_the_figures_are_those_of_the_machine_and_of_the_loop(tmp_path: Path) -> None:
    machine(tmp_path, pages=100, fds=3)

    async def look(others: int) -> int:
        waiting = [asyncio.create_task(asyncio.Event().wait()) for _ in range(others)]
        figures = Vitals(clock=lambda: 0, proc=tmp_path).figures()
        for each in waiting:
            each.cancel()
        assert figures["open_fds"] == 3
        assert figures["resident_bytes"] % 100 == 0
        assert figures["resident_bytes"] >= 100 * 4096
        return figures["tasks"]

    assert [asyncio.run(look(others)) for others in (0, 7)] == [1, 8]


def test_within_a_second_it_does_not_look_again(tmp_path: Path) -> None:
    now_ns = 0
    vitals = Vitals(clock=lambda: now_ns, proc=tmp_path)
    machine(tmp_path, pages=1, fds=1)
    assert vitals.figures()["open_fds"] == 1
    machine(tmp_path, pages=1, fds=2)
    now_ns = LOOK_NS - 1 * MS
    assert vitals.figures()["open_fds"] == 1
    now_ns = LOOK_NS
    assert vitals.figures()["open_fds"] == 2


def test_what_a_system_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert Vitals(clock=lambda: 0, proc=tmp_path / "none").figures() == {"tasks": 0}
