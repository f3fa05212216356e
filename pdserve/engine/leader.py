"""The first rank of a split model, and the processes of the others, which follow it.

    Followers ── plan, go, steps ──►  follower (a process per further rank)
        ▲    ◄── ready                │
        └──── blocks ◄────────────────┘        and in each step all ranks meet in the sums

The first rank is a worker as any other: loop, mover, sampling. Before it computes a step it tells
the followers what is in it (``packed_runs``), and they compute it on their parts. They are child
processes on the same host and not actors of their own: they share their leader's life, devices and
reservation, need nothing but a socket pair each, and work where there is no Ray.

Waits are bounded by ``WAIT_S``: a rank that dies is noticed at once (its sockets close), one that
hangs within that, as ``RankLost``, which ends the engine; supervision starts the worker again.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pdserve.config import ModelConfig
from pdserve.engine.channel import Channel
from pdserve.engine.follower import Plan
from pdserve.engine.packed_runs import packed
from pdserve.engine.shares import RankShares
from pdserve.engine.staging import mapped_memory, new_memory
from pdserve.errors import ConfigError, RankLost
from pdserve.model.load import load_runner, prepare
from pdserve.model.parallel.group import Alone, Group, Ranks
from pdserve.model.parallel.load import load_rank
from pdserve.model.parallel.parts import Split, part_of
from pdserve.model.pool import block_bytes as bytes_of_block
from pdserve.model.runner import ModelRunner, Run

WAIT_S = 15.0
"""Less than what supervision takes for a hang (``worker_shell.STUCK_S``), so that the error says
what happened; ranks wait for one another for milliseconds."""

LOADING_S_MAX = 600.0
"""All ranks read the same files at the same time: none is much later than the first."""

ENDING_S_MAX = 5.0
_CPU = torch.device("cpu")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


class Follower:
    def __init__(
        self, rank: int, environment: dict[str, str], *, wait_s: float, staging: int
    ) -> None:
        self.rank = rank
        self.steps, steps_end = Channel.pair(wait_s=wait_s)
        self.blocks, blocks_end = Channel.pair(wait_s=wait_s)
        numbers = [steps_end.fileno(), blocks_end.fileno(), staging]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pdserve.engine.follower", *map(str, numbers)],
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=numbers,
        )
        for end in (steps_end, blocks_end):
            end.close()  # else its process would never see ours hang up

    def close(self) -> None:
        self.steps.close()
        self.blocks.close()


class Followers:
    """Rank ``i + 1`` is ``followers[i]``. With none, all of this does nothing."""

    def __init__(
        self,
        plans: Sequence[Plan] = (),
        *,
        device: torch.device = _CPU,
        meeting: Path | None = None,
        block_bytes: int = 0,
    ) -> None:
        self._meeting = meeting
        self._group: Ranks | None = None
        self._followers: list[Follower] = []
        self.staging = memoryview(b"")
        if not plans:
            return
        descriptor = new_memory(block_bytes)
        try:
            for plan in plans:
                environment = _environment(plan.rank, device)
                follower = Follower(plan.rank, environment, wait_s=plan.wait_s, staging=descriptor)
                self._followers.append(follower)
                follower.steps.send(plan.packed())
        except BaseException:
            os.close(descriptor)
            self.close()
            raise
        self.staging = mapped_memory(descriptor)

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    def shares(self) -> list[RankShares]:
        return [RankShares(follower.blocks) for follower in self._followers]

    def join(self, split: Split, device: torch.device, *, wait_s: float) -> Group:
        """Waits until all have loaded, and meets them.

        Raises:
            ConfigError: one cannot load its part, and says why.
            RankLost: one has died, or did not come in time.
        """
        for follower in self._followers:
            follower.steps.bound(LOADING_S_MAX)
            if problem := follower.steps.receive():
                raise ConfigError(problem.decode())
            follower.steps.bound(wait_s)
        for follower in self._followers:
            follower.steps.send(b"")
        assert self._meeting is not None
        self._group = Ranks(split, self._meeting, device, wait_s=wait_s)
        return self._group

    def tell(self, runs: Sequence[Run]) -> None:
        step = packed(runs)
        for follower in self._followers:
            follower.steps.send(step)

    def check(self) -> None:
        """Raises ``RankLost`` where one has ended, between steps too."""
        for follower in self._followers:
            code = follower.process.poll()
            if code is not None:
                raise RankLost(
                    f"rank {follower.rank} of this split model, process {follower.process.pid}, "
                    f"ended with {code}; the worker must be started again"
                )

    def close(self) -> None:
        """Ends all of them, within ``ENDING_S_MAX``. Twice is once."""
        for follower in self._followers:
            follower.close()
        for follower in self._followers:
            try:
                follower.process.wait(ENDING_S_MAX)
            except subprocess.TimeoutExpired:
                follower.process.kill()
                follower.process.wait()
        self._followers = []
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._meeting is not None:
            shutil.rmtree(self._meeting.parent, ignore_errors=True)


def load_leader(
    config: ModelConfig,
    *,
    rank_count: int,
    part_count: int,
    block_count: int | None,
    pool_bytes: int,
    threads: int = 0,
    running_max: int = 64,
    wait_s: float = WAIT_S,
) -> tuple[ModelRunner, Followers]:
    """A runner of the model over ``rank_count`` processes, this one the first, and the others.

    Args:
        part_count: a multiple of ``rank_count``; who is to share KV blocks has the same.
        block_count: KV blocks of the pool; None takes as many as fit into ``pool_bytes``, the
            memory of all ranks together.
        threads: of each rank on a CPU; 0 shares the cores evenly.
        running_max: as ``model.load.load_runner``.

    Raises:
        ConfigError: as ``model.load.prepare``; or the model does not come out even, or there are
            too few devices.
        RankLost: a process died while it loaded.
    """
    if part_count == 1:
        whole = load_runner(
            config,
            block_count=block_count,
            pool_bytes=pool_bytes,
            threads=threads,
            running_max=running_max,
        )
        return whole, Followers()
    threads = threads or max(1, len(os.sched_getaffinity(0)) // rank_count)
    prepared = prepare(config, block_count=block_count, pool_bytes=pool_bytes, threads=threads)
    part_of(
        prepared.architecture, part_count
    )  # what does not come out even is said by this process
    split, device = Split(part_count, rank_count, 0), prepared.device
    if rank_count == 1:
        return load_rank(prepared, split, join=Alone), Followers()
    if device.type == "cuda" and torch.cuda.device_count() < rank_count:
        raise ConfigError(
            f"tensor_parallel is {rank_count}, but the worker sees {torch.cuda.device_count()} "
            "CUDA devices; lower it, or set the pool's gpus to what one process takes"
        )
    meeting = Path(tempfile.mkdtemp(prefix="pdserve-ranks-")) / "meeting"
    plans = [
        Plan(
            model=dataclasses.asdict(config),
            part_count=part_count,
            rank_count=rank_count,
            rank=rank,
            block_count=prepared.block_count,
            threads=threads,
            meeting=str(meeting),
            wait_s=wait_s,
        )
        for rank in range(1, rank_count)
    ]
    followers = Followers(
        plans,
        device=device,
        meeting=meeting,
        block_bytes=bytes_of_block(prepared.architecture, prepared.block_tokens, prepared.dtype),
    )
    try:
        runner = load_rank(
            prepared,
            split,
            join=lambda: followers.join(split, device, wait_s=wait_s),
            others=followers.shares(),
            before=followers.tell,
            staging=followers.staging,
        )
    except BaseException:
        followers.close()
        raise
    return runner, followers


def _environment(rank: int, device: torch.device) -> dict[str, str]:
    """Ours, with our import path, and on GPUs one device: the rank-th of those that we see."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)}
    if device.type == "cuda":
        visible = os.environ.get(_VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
        environment[_VISIBLE] = visible.split(",")[rank]
    return environment
