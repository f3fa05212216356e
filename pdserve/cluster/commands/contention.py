"""What the workers of one machine cost each other: a measurement with others at work beside it.

    python -m pdserve.cluster.commands.contention    # a *neighbour*; settings on its first line

A neighbour has the configuration's model and threads, and prefills and decodes in turn until its
input ends. *Contention* is how many times as long the same work takes beside neighbours as alone.
It is a median over a median: beside others the shortest run is the one that met them least.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator

from pdserve.cluster.commands.profiling import Bench, Say
from pdserve.cluster.compute_threads import set_threads
from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.settings import from_tree, to_tree

ROUNDS = 9
START_S = 120.0
STOP_S = 10.0

BUSY = "busy"
"""What a neighbour says once it works."""


def contention(bench: Bench, config: ClusterConfig, neighbours: int, say: Say) -> float:
    """How many times as long everything takes beside so many neighbours; never below 1.

    Args:
        bench: filled.

    Raises:
        ConfigError: a neighbour did not come to work.
    """
    assert neighbours > 0
    alone_s = _typical_s(bench)
    say(f"the same beside {neighbours} other{'s' * (neighbours > 1)}")
    with busy_neighbours(config, neighbours):
        beside_s = _typical_s(bench)
    return max(1.0, beside_s / alone_s)


def _typical_s(bench: Bench) -> float:
    return statistics.median(bench.round_s() for _ in range(ROUNDS))


@contextlib.contextmanager
def busy_neighbours(config: ClusterConfig, count: int) -> Iterator[None]:
    """So many processes at work.

    Raises:
        ConfigError: one of them did not come so far within ``START_S``.
    """
    command = [sys.executable, "-m", "pdserve.cluster.commands.contention"]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(_neighbour(command, config)) for _ in range(count)]
        for process in started:
            _wait_for(process)
        yield


@contextlib.contextmanager
def _neighbour(command: list[str], config: ClusterConfig) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead, which its silence will tell
            process.stdin.write(json.dumps(to_tree(config)) + "\n")
            process.stdin.flush()
        yield process
    finally:
        try:
            process.communicate(timeout=STOP_S)  # the end of its input is its signal to leave
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    too_long = threading.Timer(START_S, process.kill)
    too_long.start()
    try:
        said = process.stdout.readline().strip()
    finally:
        too_long.cancel()
    if said != BUSY:
        raise ConfigError(
            "neighbours: a process that was to work beside the measurement did not begin; see "
            "above, and whether memory is enough for one more model"
        )


def work_until_told() -> None:
    """A neighbour's whole life."""
    config = from_tree(json.loads(sys.stdin.readline()))
    set_threads(config.decode, alone=False)
    from pdserve.engine.leader import load_leader

    runner, followers = load_leader(
        config.model,
        rank_count=config.decode.tensor_parallel,
        part_count=config.tensor_parts,
        block_count=config.decode.pool_blocks,
        pool_bytes=config.decode.pool_bytes,
        threads=config.decode.threads,
    )
    try:
        bench = Bench(
            runner, chunk_tokens=config.prefill.chunk_tokens, running_max=config.decode.running_max
        )
        bench.fill()
        over = threading.Event()
        threading.Thread(target=_set_at_end_of_input, args=(over,), daemon=True).start()
        print(BUSY, flush=True)
        while not over.is_set():
            bench.round_s()
    finally:
        followers.close()


def _set_at_end_of_input(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


if __name__ == "__main__":
    work_until_told()
