"""Ranks that die, hang, cannot load or lose their leader: who notices, and within what."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pdserve.config import ModelConfig
from pdserve.engine import leader
from pdserve.engine.follower import Plan
from pdserve.engine.leader import Followers, load_leader
from pdserve.errors import ConfigError, RankLost
from pdserve.model.parallel.parts import Split
from pdserve.model.runner import ModelRunner, Run
from tests.models.small import write_small_model

WAIT_S = 10.0
"""What a busy machine may take to let ranks meet."""

HANG_S = 2.0
NOTICED_S_MAX = 10 * HANG_S

STEP = [Run([3, 1, 4], 0, [0])]
LEADER = """
import sys
from pdserve.config import ModelConfig
from pdserve.engine.leader import load_leader
from pdserve.model.runner import Run
model = ModelConfig(source=sys.argv[1], device="cpu", dtype="float32")
runner, followers = load_leader(
    model, rank_count=2, part_count=2, block_count=2, pool_bytes=0, threads=1
)
print(*followers.pids, flush=True)
while True:
    runner.step([Run([3, 1, 4], 0, [0])])
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def split(
    directory: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[tuple[ModelRunner, Followers]]:
    monkeypatch.setattr(leader, "ENDING_S_MAX", 0.5)  # who is stopped does not end by itself
    runner, followers = load_leader(
        ModelConfig(source=str(directory), device="cpu", dtype="float32"),
        rank_count=2,
        part_count=2,
        block_count=2,
        pool_bytes=0,
        threads=1,
        wait_s=getattr(request, "param", WAIT_S),
    )
    yield runner, followers
    pids = followers.pids
    followers.close()
    assert not any(is_alive(pid) for pid in pids)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_dead_rank_is_noticed_between_steps_and_in_the_next(
    split: tuple[ModelRunner, Followers],
) -> None:
    runner, followers = split
    runner.step(STEP)
    followers.check()
    os.kill(followers.pids[0], signal.SIGKILL)
    with pytest.raises(RankLost, match="must be started again"):
        runner.step(STEP)
    os.waitid(os.P_PID, followers.pids[0], os.WEXITED | os.WNOWAIT)  # sockets go a little earlier
    with pytest.raises(RankLost, match=r"rank 1 .* ended with -9"):
        followers.check()
    with pytest.raises(RankLost, match="no word"):
        runner.pool.copy_block(0, 1)


def test_after_a_question_without_an_answer_no_other_is_put(
    split: tuple[ModelRunner, Followers],
) -> None:
    """What a rank that hung might still answer would be taken for the answer to the next."""
    runner, followers = split
    followers._followers[0].blocks.bound(HANG_S / 4)
    stop(followers.pids[0])
    first_s = seconds_until_lost(lambda: runner.pool.copy_block(0, 1), "bound 0.5 s")
    second_s = seconds_until_lost(lambda: runner.pool.copy_block(0, 1), "no word")
    assert second_s < first_s / 2
    followers.check()  # a process is there


@pytest.mark.slow
@pytest.mark.parametrize("split", [HANG_S], indirect=True)
def test_a_rank_that_hangs_is_noticed_within_the_bound(
    split: tuple[ModelRunner, Followers],
) -> None:
    runner, followers = split
    stop(followers.pids[0])
    in_step_s = seconds_until_lost(lambda: runner.step(STEP), f"did not come within {HANG_S:g} s")
    assert in_step_s < NOTICED_S_MAX


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)  # its threads may run on for a moment


def seconds_until_lost(use: Callable[[], object], says: str) -> float:
    began_s = time.monotonic()
    with pytest.raises(RankLost, match=says):
        use()
    return time.monotonic() - began_s


@pytest.mark.slow
def test_what_a_rank_cannot_load_is_said_by_the_first(directory: Path, tmp_path: Path) -> None:
    plan = Plan(
        model={"source": str(tmp_path / "none"), "device": "cpu"},
        part_count=2,
        rank_count=2,
        rank=1,
        block_count=2,
        threads=1,
        meeting=str(tmp_path / "ranks" / "meeting"),
        wait_s=WAIT_S,
    )
    followers = Followers([plan], meeting=tmp_path / "ranks" / "meeting", block_bytes=1)
    (pid,) = followers.pids
    with pytest.raises(ConfigError, match=r"rank 1: model.source is .*none"):
        followers.join(Split(2, 2, 0), torch.device("cpu"), wait_s=WAIT_S)
    followers.close()
    assert not is_alive(pid)


@pytest.mark.slow
def test_a_killed_leader_leaves_no_orphan_and_no_file(directory: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LEADER, str(directory)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == len(list(tmp_path.glob("pdserve-ranks-*"))) == 1
        time.sleep(0.2)  # it is in a step
        process.kill()
    until_s = time.monotonic() + NOTICED_S_MAX
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until_s, f"{pids} live on"
        time.sleep(0.02)
    assert not list(tmp_path.glob("pdserve-ranks-*"))
