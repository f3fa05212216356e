"""A worker that says nothing is left; unless it was the router that did not listen."""

from dataclasses import replace

from pdserve.clock import MS
from pdserve.ids import WorkerId
from tests.unit.router.build import core_with, hello, settings

SILENCE_MS = 3000
CONFIG = replace(settings(), worker_silence_ms=SILENCE_MS)
P0, D0 = WorkerId("p0"), WorkerId("d0")


def test_a_silent_worker_is_left_and_not_known_until_it_says_hello() -> None:
    core, (_, d0) = core_with(hello("p0"), hello("d0"), config=CONFIG)
    d0.report(now_ns=2000 * MS)
    core.on_tick((SILENCE_MS - 1) * MS)
    assert core.knows(P0)
    core.on_tick(SILENCE_MS * MS)
    assert not core.knows(P0)
    assert core.knows(D0)
    core.on_hello(hello("p0"), SILENCE_MS * MS)
    assert core.knows(P0)


def test_silence_while_nobody_listened_does_not_count() -> None:
    core, _ = core_with(hello("p0"), hello("d0"), config=CONFIG)
    core.slept(60_000 * MS)
    core.on_tick(60_000 * MS)
    assert core.knows(P0)
    core.on_tick((60_000 + SILENCE_MS) * MS)
    assert not core.knows(P0)
