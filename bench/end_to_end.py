"""The whole system with the real model: first tokens, gaps between tokens, throughput, start.

    python -m bench.end_to_end [--json FILE] [--quick]

One cluster on this machine, as ``pdserve serve`` starts it, asked over HTTP through our own server
by a client on the same machine. In turn with it the bare engine (``bare_engine``): a process with
the same model, dtype and threads, and nothing around it. What a decode step loses to sockets,
threads and pushes is measured within one process, by ``engine_step``.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.bare_engine import BareEngine, Done, Work, bare_engine
from bench.frame import ROOT, Options, Row, at_most, interleave, row, run
from bench.http_load import Answer, ask, ask_all, random_tokens
from bench.kvstore_node import running_node
from pdserve.cluster.local import local_cluster
from pdserve.config import ClusterConfig, GatewayConfig
from pdserve.errors import PdserveError
from pdserve.messages import Address
from pdserve.wire.connection import Connection
from pdserve.wire.hosts import local_host_id
from pdserve.wire.listener import Listener

LONG_TOKENS = 512
SHORT_TOKENS = 64
ANSWER_TOKENS = 64
BATCH = 16  # requests at once, for throughput
STREAMS = 8
PUSHED_BLOCKS = 32
STORE_SLOTS = 376
START_S_MAX = 120.0

FIRST_TOKEN = re.compile(rb"model {4}\S")  # of the chat that `pdserve serve` begins with


def measure(options: Options) -> Iterator[Row]:
    yield row("start to first token", start_s(1 if options.quick else 3), "s", bar=at_most(25))
    yield from engine_steps(options)
    config = ClusterConfig(gateway=GatewayConfig(http_port=0, grpc_port=-1), tcp=False)
    with bare_engine() as bare, local_cluster(config) as cluster:
        against = Pair(cluster.http, bare)
        against.warm_up()
        yield from first_tokens(against, options)
        for streams in (1, STREAMS):
            yield from gaps(against, streams, options)
        yield throughput(against, options)


class Pair:
    """The cluster and the bare engine, asked for the same; every prompt is new to them."""

    def __init__(self, url: str, bare: BareEngine) -> None:
        self._url = url
        self._bare = bare
        self._seeds = itertools.count(0, BATCH)

    def warm_up(self) -> None:
        self.cluster(2, SHORT_TOKENS, 8)
        self.bare(2, SHORT_TOKENS, 8)

    def cluster(self, sequences: int, prompt_tokens: int, generated_tokens: int) -> list[Answer]:
        seed = next(self._seeds)
        prompts = [random_tokens(prompt_tokens, seed + index) for index in range(sequences)]
        if sequences == 1:
            return [ask(self._url, prompts[0], generated_tokens)]
        return ask_all(self._url, prompts, generated_tokens)

    def bare(self, sequences: int, prompt_tokens: int, generated_tokens: int) -> Done:
        return self._bare.do(Work(sequences, prompt_tokens, generated_tokens, next(self._seeds)))


# ── in the cluster ───────────────────────────────────────────────────────────────────────────────


def first_tokens(against: Pair, options: Options) -> Iterator[Row]:
    answers: list[Answer] = []

    def cluster() -> float:
        (answer,) = against.cluster(1, LONG_TOKENS, 2)
        assert answer.cached_tokens == 0, f"{answer.cached_tokens} tokens were cached"
        answers.append(answer)
        return (answer.token_s[0] - answer.sent_s) * 1000

    def bare() -> float:
        return against.bare(1, LONG_TOKENS, 1).prefill_ms[0]

    samples = interleave(options.rounds(60), cluster=cluster, bare=bare)
    title = f"TTFT {{}}, {LONG_TOKENS} tokens, alone"
    yield from both_percentiles(title, samples, "bare prefill")
    overheads = [(a.first_byte_s - a.sent_s) * 1000 - a.timing["step_ms"] for a in answers]
    yield row("receipt to first byte, less engine step", overheads, "ms", bar=at_most(15))
    yield row("… of it in the queue", [a.timing["queue_ms"] for a in answers], "ms")
    beside = [a.timing["prefill_ms"] - a.timing["step_ms"] for a in answers]
    yield row("… of it at prefill, beside the step", beside, "ms")
    yield row(
        "hand-off, first token to decode's own", [a.timing["handoff_ms"] for a in answers], "ms"
    )


def gaps(against: Pair, streams: int, options: Options) -> Iterator[Row]:
    between: dict[str, list[float]] = {"cluster": [], "bare": []}

    def cluster() -> float:
        answers = against.cluster(streams, SHORT_TOKENS, ANSWER_TOKENS)
        between["cluster"] += steady_gaps_ms(answers)
        return 0.0

    def bare() -> float:
        between["bare"] += against.bare(streams, SHORT_TOKENS, ANSWER_TOKENS).step_ms
        return 0.0

    interleave(options.rounds(10), cluster=cluster, bare=bare)
    title = f"gap between tokens {{}}, {streams} stream{'s' if streams > 1 else ''}"
    return both_percentiles(title, between, "bare step")


def steady_gaps_ms(answers: list[Answer]) -> list[float]:
    """While all streams run: from when the last has begun until the first ends."""
    begin_s = max(answer.token_s[0] for answer in answers)
    end_s = min(answer.token_s[-1] for answer in answers)
    return [
        (after - before) * 1000
        for answer in answers
        for before, after in itertools.pairwise(answer.token_s)
        if begin_s <= before and after <= end_s
    ]


def throughput(against: Pair, options: Options) -> Row:
    work = (BATCH, LONG_TOKENS, ANSWER_TOKENS)

    def cluster() -> float:
        answers = against.cluster(*work)
        begun_s = min(answer.sent_s for answer in answers)
        return BATCH * ANSWER_TOKENS / (max(a.token_s[-1] for a in answers) - begun_s)

    samples = interleave(
        options.rounds(6),
        cluster=cluster,
        bare=lambda: BATCH * ANSWER_TOKENS / against.bare(*work).total_s,
    )
    return row(
        f"throughput, {BATCH} × ({LONG_TOKENS} in, {ANSWER_TOKENS} out)",
        samples["cluster"],
        "tokens/s",
        reference="bare engine",
        reference_samples=samples["bare"],
    )


def both_percentiles(title: str, samples: dict[str, list[float]], reference: str) -> Iterator[Row]:
    for name, at in (("p50", 0.5), ("p99", 0.99)):
        yield row(
            title.format(name),
            samples["cluster"],
            "ms",
            reference=f"{reference}, {name}",
            reference_samples=samples["bare"],
            at=at,
        )


# ── beside the engine ────────────────────────────────────────────────────────────────────────────


def engine_steps(options: Options) -> Iterator[Row]:
    with running_node(slot_count=STORE_SLOTS) as store, token_sink() as sink:
        samples = {
            pushed: step_samples(store, sink, options.rounds(16), pushed)
            for pushed in (0, PUSHED_BLOCKS)
        }
    for pushed, name in ((0, "nothing pushed"), (PUSHED_BLOCKS, "a push in flight")):
        for at, bar in ((0.5, None), (0.99, at_most(1.1, of="ratio") if pushed else None)):
            yield row(
                f"step p{at * 100:g}, 64 streams, {name}",
                samples[pushed]["loop"],
                "ms",
                reference="plain loop",
                reference_samples=samples[pushed]["plain"],
                bar=bar,
                at=at,
            )


def step_samples(store: Address, sink: Address, rounds: int, pushed: int) -> dict[str, list[float]]:
    """From a process that is set up as a decode worker's is."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.engine_step"),
            *(json.dumps(dataclasses.asdict(address)) for address in (store, sink)),
            *(str(rounds), str(pushed)),
        ],
        check=True,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    )
    samples: dict[str, list[float]] = json.loads(done.stdout)
    return samples


@contextlib.contextmanager
def token_sink() -> Iterator[Address]:
    """Somebody who takes what a worker says: a listener on a thread of this process."""
    ready: list[Address] = []
    listening, ending = threading.Event(), threading.Event()

    async def swallow(connection: Connection) -> None:
        with contextlib.suppress(PdserveError):
            while True:
                await connection.receive()

    async def listen(directory: Path) -> None:
        listener = await Listener.open(directory, "sink", host=local_host_id(), serve=swallow)
        ready.append(listener.address)
        listening.set()
        await asyncio.to_thread(ending.wait)
        await listener.close()

    with tempfile.TemporaryDirectory(prefix="pd-") as directory:
        thread = threading.Thread(target=lambda: asyncio.run(listen(Path(directory))))
        thread.start()
        listening.wait()
        try:
            yield ready[0]
        finally:
            ending.set()
            thread.join()


# ── starting ─────────────────────────────────────────────────────────────────────────────────────


def start_s(rounds: int) -> list[float]:
    """From the command to the first token of the chat that it shows."""
    return [_start_once_s() for _ in range(rounds)]


def _start_once_s() -> float:
    began_s = time.perf_counter()
    serving = subprocess.Popen(
        [
            *(sys.executable, "-m", "pdserve.cluster.cli", "serve"),
            *("--http-port", "0", "--grpc-port", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert serving.stdout is not None
    with serving:
        said = b""
        while not FIRST_TOKEN.search(said) and time.perf_counter() - began_s < START_S_MAX:
            piece = os.read(serving.stdout.fileno(), 4096)
            assert piece, f"`pdserve serve` ended before its first token: {said.decode()}"
            said += piece
        took_s = time.perf_counter() - began_s
        serving.send_signal(signal.SIGINT)
        serving.stdout.read()  # until it has cleaned up
    return took_s


if __name__ == "__main__":
    run("end_to_end", measure)
