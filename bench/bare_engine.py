"""The engine without a cluster, as a process: what the model gives when nothing is around it.

    python -m bench.bare_engine        one JSON object per line on stdin, one answer each on stdout

It loads what a worker loads and does what requests need, and no more: the prompts in chunks, one
after the other, then all sequences together, a token each per step. Its OpenMP threads wait as they
do by default, actively, which is best for a process that has the machine to itself.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

from bench.frame import ROOT

if TYPE_CHECKING:
    from pdserve.model.runner import ModelRunner

CHUNK_TOKENS = 512  # a worker's default
POOL_BLOCKS = 16 * 40  # 16 sequences of up to 640 tokens


@dataclass(frozen=True, slots=True)
class Work:
    """``sequences`` prompts of random tokens; each gets ``generated_tokens``."""

    sequences: int
    prompt_tokens: int
    generated_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Done:
    total_s: float
    prefill_ms: list[float]  # of each prompt, up to its first token
    step_ms: list[float]  # of each decode step, all sequences together


class BareEngine:
    """The process, for whoever measures it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._answer()  # the model is loaded

    def do(self, work: Work) -> Done:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(work)) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._answer()))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the bare engine has ended; its own words are above"
        return line


@contextlib.contextmanager
def bare_engine() -> Iterator[BareEngine]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.bare_engine"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))},
    )
    with process:  # closes stdin, which ends it, and waits
        yield BareEngine(process)


def main() -> None:
    from pdserve.config import ModelConfig
    from pdserve.model.load import load_runner

    runner = load_runner(ModelConfig(), block_count=POOL_BLOCKS, pool_bytes=0)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(_do(runner, Work(**json.loads(line))))), flush=True)


def _do(runner: "ModelRunner", work: Work) -> Done:
    from bench.http_load import random_tokens
    from bench.plain_loop import PlainLoop

    loop = PlainLoop(runner)
    room_tokens = work.prompt_tokens + work.generated_tokens
    for index in range(work.sequences):
        prompt = random_tokens(work.prompt_tokens, work.seed + index)
        loop.add(prompt, room_tokens=room_tokens)
    began_s = time.perf_counter()
    prefill_ms = [
        _timed_ms(partial(loop.prefill, sequence, CHUNK_TOKENS)) for sequence in loop.sequences
    ]
    step_ms = [_timed_ms(loop.decode) for _ in range(work.generated_tokens - 1)]
    return Done(time.perf_counter() - began_s, prefill_ms, step_ms)


def _timed_ms(action: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    action()
    return (time.perf_counter() - began_s) * 1000


if __name__ == "__main__":
    main()
