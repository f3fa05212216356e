"""A process with one of the further ranks of a split model: it computes what the first rank says.

    python -m pdserve.engine.follower STEPS BLOCKS STAGING

(descriptors that it inherits: two sockets, and memory)

``leader.Followers`` starts it. Over STEPS come a plan, which it answers once its weights are in
memory, and then steps, which it does not answer: the ranks meet in the sums (``model.parallel``).
Over BLOCKS come orders to move its shares of blocks, by way of STAGING, served by a thread.

It decides nothing and owns nothing. When the first rank closes its ends, or dies in whatever way,
this process ends at once, in the middle of a step too.
"""

import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdserve.config import ModelConfig
from pdserve.engine.channel import Channel
from pdserve.engine.staging import mapped_memory
from pdserve.errors import PdserveError, RankLost
from pdserve.storms import log_to_stderr

if TYPE_CHECKING:
    from pdserve.model.parallel.pool import PartedPool
    from pdserve.model.runner import ModelRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a follower is told first."""

    model: dict[str, Any]
    """``ModelConfig``'s fields."""

    part_count: int
    rank_count: int
    rank: int
    block_count: int
    threads: int
    meeting: str
    """Where the ranks find one another; its directory ends with them."""

    wait_s: float

    def packed(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()


def main() -> None:
    log_to_stderr()
    # A terminal's ^C goes to all of its processes; whether it ends anything is the leader's word.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps, blocks = (
        Channel(socket.socket(fileno=int(number)), wait_s=None) for number in sys.argv[1:3]
    )
    staging = mapped_memory(int(sys.argv[3]))
    pool: Future[PartedPool] = Future()
    meetings: list[Path] = []
    threading.Thread(target=_serve, args=(blocks, pool, meetings), daemon=True).start()
    try:
        plan = Plan(**json.loads(steps.receive()))
        meetings.append(Path(plan.meeting).parent)
        runner = _runner(plan, steps, staging)
        pool.set_result(runner.pool)  # type: ignore[arg-type]  # a rank's pool is a parted one
        _follow(runner, steps)
    except RankLost as error:
        log.debug("%s", error)
        _end(0, meetings)
    except BaseException:
        log.exception("rank ends")
        _end(1, meetings)


def _runner(plan: Plan, steps: Channel, staging: memoryview) -> "ModelRunner":
    # Only now: a process that waits for its plan loads nothing.
    from pdserve.model.load import prepare
    from pdserve.model.parallel.group import Ranks
    from pdserve.model.parallel.load import load_rank
    from pdserve.model.parallel.parts import Split

    split = Split(plan.part_count, plan.rank_count, plan.rank)

    def join() -> Ranks:
        steps.send(b"")
        steps.receive()  # the leader has loaded too: from now on waits are short
        return Ranks(split, Path(plan.meeting), prepared.device, wait_s=plan.wait_s)

    try:
        prepared = prepare(
            ModelConfig(**plan.model),
            block_count=plan.block_count,
            pool_bytes=0,
            threads=plan.threads,
        )
        return load_rank(prepared, split, join=join, staging=staging)
    except (PdserveError, MemoryError, OSError) as error:
        if not isinstance(error, RankLost):
            steps.send((f"rank {plan.rank}: " + (str(error) or repr(error))).encode())
        raise


def _follow(runner: "ModelRunner", steps: Channel) -> None:
    from pdserve.engine.packed_runs import unpacked

    while True:
        runner.step(unpacked(steps.receive()))


def _serve(blocks: Channel, pool: "Future[PartedPool]", meetings: list[Path]) -> None:
    """On a thread, which also is the first to see that the leader is gone."""
    from pdserve.engine.shares import serve

    try:
        serve(blocks, pool.result)
    except RankLost:
        _end(0, meetings)
    except BaseException:
        log.exception("rank ends")
        _end(1, meetings)


def _end(code: int, meetings: list[Path]) -> None:
    """Without a word to torch, whose own way out would wait for ranks that are gone."""
    for directory in meetings:
        shutil.rmtree(directory, ignore_errors=True)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
