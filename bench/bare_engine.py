"""The engine without a cluster, as a process: what the model gives when nothing is around it.

    python -m bench.bare_engine [QUANTIZATION]
                                       one JSON object per line on stdin, one answer each on stdout

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
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.frame import ROOT

if TYPE_CHECKING:
    from pdserve.model.runner import ModelRunner
    from pdserve.model.weights import Weights

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
        self._began_s = time.perf_counter()
        self._process = process
        self._answer()  # the model is loaded

    def do(self, work: Work) -> Done:
        return Done(**self._asked({"work": asdict(work)}))

    def matrices_s(self, rows: int) -> float:
        """What the model's matrices alone take, head included, for a chunk of so many rows."""
        seconds: float = self._asked({"matrices_rows": rows})
        return seconds

    def overhead_mib(self) -> float:
        """Resident memory beside the weights and the pool of KV blocks."""
        mib: float = self._asked({"memory": True})
        return mib

    @property
    def age_s(self) -> float:
        return time.perf_counter() - self._began_s

    def _asked(self, what: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the bare engine has ended; its own words are above"
        return line


@contextlib.contextmanager
def bare_engine(*, quantization: str = "auto") -> Iterator[BareEngine]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.bare_engine", quantization],
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

    quantization: Any = sys.argv[1] if len(sys.argv) > 1 else "auto"
    model = ModelConfig(quantization=quantization)
    runner = load_runner(model, block_count=POOL_BLOCKS, pool_bytes=0)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(runner, json.loads(line))), flush=True)


def _answer(runner: "ModelRunner", asked: dict[str, Any]) -> Any:
    match asked:
        case {"work": work}:
            return asdict(_do(runner, Work(**work)))
        case {"matrices_rows": rows}:
            return _matrices_s(runner, rows)
        case _:
            pool = runner.pool
            known_bytes = _weight_bytes(runner.weights) + pool.block_count * pool.block_bytes
            return _resident_mib() - known_bytes / 2**20


def _resident_mib() -> float:
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in one]
    return int(line.split()[1]) / 1024


def _weight_bytes(weights: "Weights") -> int:
    """Each tensor once, though the embedding may be the head."""
    from torch import Tensor

    tensors: dict[int, int] = {}
    left: list[Any] = [weights]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            tensors[value.data_ptr()] = value.nbytes
        elif isinstance(value, tuple):
            left += value
        elif is_dataclass(value):
            left += [getattr(value, one.name) for one in fields(value)]
    return sum(tensors.values())


def _matrices_s(runner: "ModelRunner", rows: int) -> float:
    import torch

    from pdserve.model.ops import FeedForward

    shape, linear = runner.architecture, runner.ops.linear
    hidden, attended, ffn = (
        torch.randn(rows, channels).to(torch.bfloat16)
        for channels in (shape.hidden, shape.head_count * shape.head_dim, shape.ffn)
    )

    def once() -> None:
        for layer in runner.weights.layers:
            assert isinstance(layer.ffn, FeedForward)
            linear(hidden, layer.qkv)
            linear(attended, layer.attention_output)
            linear(hidden, layer.ffn.gate_up)
            linear(ffn, layer.ffn.down)
        linear(hidden[:1], runner.weights.head)

    return _timed_ms(once) / 1000


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
