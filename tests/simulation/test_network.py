"""Goal: the end of a connection crosses a partition as little as bytes do, and no side waits for it
for longer than a kernel would.

Method: two processes on two hosts and one connection between them, in virtual time, for many seeds.
"""

import random

import pytest

from pdserve.clock import MS, S
from tests.simulation.loop import SimProcess, VirtualLoop
from tests.simulation.network import UNACKNOWLEDGED_NS, End, Network, Pair

SEEDS = range(20)
APART_NS = 3 * S


class Ear:
    """A protocol that notes when it heard what."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.heard = b""
        self.ended_ns: int | None = None
        self._loop = loop
        self._buffer = bytearray(1 << 10)

    def connection_made(self, transport: End) -> None:
        """It is told by the pair."""

    def get_buffer(self, _: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.heard += self._buffer[:count]

    def pause_writing(self) -> None:
        """Nothing is written here that waits."""

    def connection_lost(self, _: Exception | None) -> None:
        assert self.ended_ns is None, "a connection ends once"
        self.ended_ns = self._loop.now_ns


class Line:
    """A connection from host ``a`` to host ``b``, over which something has come already."""

    def __init__(self, seed: int) -> None:
        self.loop = VirtualLoop()
        self.network = Network(self.loop, random.Random(seed))
        self.client, self.server = SimProcess("client", "a"), SimProcess("server", "b")
        self.pair = Pair(self.network, self.client, self.server)
        self.network.pairs.append(self.pair)
        self.ears = (Ear(self.loop), Ear(self.loop))
        self.pair.open(self.ears[0], lambda: self.ears[1])
        self.pair.ends[0].write(b"before")
        self.go_on(1 * S)
        self.began_ns = self.loop.now_ns

    def go_on(self, span_ns: int) -> None:
        self.loop.run_until(lambda: False, deadline_ns=self.loop.now_ns + span_ns)

    def part(self, span_ns: int) -> None:
        self.network.block("a", "b", self.loop.now_ns + span_ns)

    def end(self, how: str) -> None:
        match how:
            case "dies":
                self.loop.kill_process(self.client)
            case "closes":
                self.pair.ends[0].close()
            case "aborts":
                self.pair.ends[0].abort()
            case "is reset":
                self.pair.reset()


def told_after_ns(seed: int, how: str, *, apart_ns: int) -> int:
    """When the server hears that the client has ended."""
    line = Line(seed)
    line.part(apart_ns)
    line.end(how)
    line.go_on(2 * UNACKNOWLEDGED_NS)
    ended_ns = line.ears[1].ended_ns
    assert ended_ns is not None, f"seed {seed}: it is never heard of"
    assert line.ears[1].heard == b"before"
    return ended_ns - line.began_ns


@pytest.mark.parametrize("how", ["dies", "closes", "aborts", "is reset"])
def test_an_end_is_not_heard_of_through_a_partition(how: str) -> None:
    after_ns = [told_after_ns(seed, how, apart_ns=APART_NS) for seed in SEEDS]
    assert min(after_ns) >= APART_NS
    assert max(after_ns) <= UNACKNOWLEDGED_NS
    at_once_ns = [told_after_ns(seed, how, apart_ns=0) for seed in SEEDS]
    assert max(at_once_ns) < 10 * MS


def test_who_hangs_up_has_done_so_whatever_is_between() -> None:
    for how in ("closes", "aborts"):
        line = Line(0)
        line.part(APART_NS)
        line.end(how)
        line.go_on(MS)
        assert line.ears[0].ended_ns is not None, how
        assert line.ears[1].ended_ns is None, how


def test_what_is_written_to_a_side_that_has_ended_is_lost() -> None:
    line = Line(0)
    line.part(APART_NS)
    line.end("aborts")
    line.go_on(MS)
    other = line.pair.ends[1]
    assert not other.is_closing(), "it does not know"
    other.write(b"in vain")
    line.go_on(2 * UNACKNOWLEDGED_NS)
    assert line.ears[0].heard == b""


@pytest.mark.parametrize("both", [False, True])
def test_a_quiet_connection_ends_where_nobody_answers_its_kernels(*, both: bool) -> None:
    line = Line(0)
    line.part(UNACKNOWLEDGED_NS + S)
    if both:
        line.network.block("b", "a", line.loop.now_ns + UNACKNOWLEDGED_NS + S)
    line.go_on(UNACKNOWLEDGED_NS - MS)
    assert [ear.ended_ns for ear in line.ears] == [None, None]
    line.go_on(2 * MS)
    assert None not in [ear.ended_ns for ear in line.ears]


def test_a_quiet_connection_outlives_a_short_partition() -> None:
    line = Line(0)
    line.part(UNACKNOWLEDGED_NS - MS)
    line.go_on(2 * UNACKNOWLEDGED_NS)
    line.pair.ends[0].write(b" and after")
    line.go_on(S)
    assert line.ears[1].heard == b"before and after"
