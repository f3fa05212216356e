"""What ``pdserve chaos`` does to processes, on processes of the test's own."""

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.cluster.chaos.plan import Strike
from pdserve.cluster.chaos.strikes import Striker, flip_bit
from pdserve.cluster.chaos.targets import arena_of
from pdserve.errors import ChecksumMismatch
from pdserve.kvstore.keys import block_keys
from tests.integration.harness import wait_for
from tests.integration.store_nodes import BLOCK_BYTES, NAMESPACE, start_node


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def state(process: subprocess.Popen[bytes]) -> str:
    status = Path(f"/proc/{process.pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0]


def strike(kind: str, *, span_s: float = 600.0) -> Strike:
    return Strike(0.0, kind, "decode", 7, span_s)


def test_whom_a_strike_stopped_goes_on_when_the_run_ends(
    victim: subprocess.Popen[bytes],
) -> None:
    with Striker(lambda: {"decode": [victim.pid]}, None) as striker:
        assert "SIGSTOP" in striker.carry_out(strike("stop"))
        wait_for("a stop", lambda: state(victim) == "T")
    wait_for("it to go on", lambda: state(victim) != "T")


def test_whom_a_strike_stopped_goes_on_by_itself(victim: subprocess.Popen[bytes]) -> None:
    with Striker(lambda: {"decode": [victim.pid]}, None) as striker:
        striker.carry_out(strike("stop", span_s=0.2))
        wait_for("it to go on", lambda: state(victim) != "T" and not striker._stopped)


def test_a_kill_is_a_kill_and_nobody_there_is_said(victim: subprocess.Popen[bytes]) -> None:
    with Striker(lambda: {"decode": [victim.pid]}, None) as striker:
        assert "SIGKILL" in striker.carry_out(strike("kill"))
        assert victim.wait(60) == -signal.SIGKILL
        assert "had just gone" in striker.carry_out(strike("kill"))
        assert striker.carry_out(strike("disk")) == "the store has no disk"
    with Striker(lambda: {"decode": []}, None) as striker:
        assert striker.carry_out(strike("kill")) == "no decode was there"


def test_the_last_one_that_is_well_is_left_alone_until_another_is_there(
    victim: subprocess.Popen[bytes],
) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        there = [victim.pid, other.pid]  # the strike's number is odd: the last of the list
        try:
            with Striker(lambda: {"decode": list(there)}, None) as striker:
                assert striker.carry_out(strike("stop")) == f"SIGSTOP to decode {other.pid}"
                there.reverse()
                assert "is the last one that is well" in striker.carry_out(strike("kill"))
                there.reverse()
                assert striker.carry_out(strike("kill")) == f"SIGKILL to decode {other.pid}"
                there.remove(other.pid)
                assert "is the last one that is well" in striker.carry_out(strike("kill"))
                there.append(1 << 30)  # a successor
                assert "SIGKILL" not in striker.carry_out(strike("kill")), "it had just gone"
                there.reverse()
                assert striker.carry_out(strike("kill")) == f"SIGKILL to decode {victim.pid}"
        finally:
            other.kill()


def test_a_flipped_bit_is_found_by_who_reads_the_block(tmp_path: Path) -> None:
    node = start_node(tmp_path, shared=Path("/dev/shm"))
    try:
        arena = arena_of(node.pid)
        assert arena is not None
        assert flip_bit(arena, random.Random(1)) == "the store was empty"
        keys = block_keys(NAMESPACE, range(16), 16)
        writer, reader = node.client("writer"), node.client("reader")
        assert writer.put(keys, 0, lambda _, out: None) == 1
        assert "slot" in flip_bit(arena, random.Random(1))
        claim = reader.claim(keys)
        with pytest.raises(ChecksumMismatch):
            reader.read(claim, 0, memoryview(bytearray(BLOCK_BYTES)))
        reader.release(claim)
        assert reader.claim(keys).count == 0, "nobody finds it again"
        writer.close()
        reader.close()
    finally:
        node.stop()
