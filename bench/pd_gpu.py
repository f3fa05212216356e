"""Prefill and decode as two processes on one GPU, the store between them. No Ray.

    python -m bench.pd_gpu [--device cpu] [--quick] [--json FILE]

Two workers as a cluster has them (model, loop, mover, store client), but for Ray around them, and a
store node in a process of its own; this process is router and gateway. The model has the shape of
Llama-3-8B and random weights, the same in both. Each prompt is computed on one and decoded on the
other; and, with other keys, computed and decoded on the second alone.

* *Exposed transfer* is what a hand-off adds: from the prompt's first token to decode having all of
  its KV. The hand-off itself passes through this process, some 100 µs. It is compared with one
  layer's part of the prompt's steps: no less is left when every layer but the last leaves while the
  next is computed.
* *Tokens* are compared with those of the second worker alone.
* *Blocks* of random bits go from the GPU to the arena and back; and, by way of a second store, from
  the GPU to the arena, from there to its disk, and, evicted from the arena, from the disk back.

``--device cpu`` takes a tiny model, to see that it runs: its times say nothing.
"""

import argparse
import contextlib
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait

import torch

from bench.decode_loop import NAMESPACE, NOWHERE, NoText, request
from bench.frame import Options, Row, at_least, at_most, row, run, skipped
from bench.kvstore_node import running_node
from bench.random_model import BLOCK_TOKENS, DTYPE, LLAMA_3_8B, TINY, random_runner
from pdserve.config import PoolConfig, StoreConfig
from pdserve.decode.streams import Streams
from pdserve.engine.blocks import blocks_for
from pdserve.engine.loop import EngineLoop
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Move, Moved, Put, Restore
from pdserve.engine.outputs import Load, Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.thread import EngineThread
from pdserve.engine.workplace import Workplace
from pdserve.ids import BlockId, WorkerId
from pdserve.kvstore.admin_client import StoreAdmin
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys
from pdserve.messages import (
    Address,
    Dispatch,
    Handoff,
    Route,
    Timing,
    TokenDelta,
    WorkerFailed,
)
from pdserve.model.architecture import Architecture
from pdserve.model.pool import KvPool
from pdserve.prefill.prompts import Prompts
from pdserve.wire.codec import MESSAGES
from pdserve.wire.hosts import local_host_id

ROUNDS = 20
WARM_UPS = 2
ANSWER_S_MAX = 300.0
MOVED_BLOCKS = 32
SSD_BYTES = 1 << 30
PREFILL, DECODE = WorkerId("prefill"), WorkerId("decode")
_END = b""


@dataclass(frozen=True, slots=True)
class Sizes:
    device: str
    architecture: Architecture
    prompt: int
    answer: int
    chunk: int

    @property
    def prompt_blocks(self) -> int:
        return blocks_for(self.prompt + self.answer, BLOCK_TOKENS)

    def pool(self, block_count: int) -> KvPool:
        return KvPool(
            self.architecture,
            block_count=block_count,
            block_tokens=BLOCK_TOKENS,
            dtype=DTYPE,
            device=torch.device(self.device),
        )


ON_GPU = Sizes("cuda", LLAMA_3_8B, prompt=4096, answer=64, chunk=512)
ON_CPU = Sizes("cpu", TINY, prompt=100, answer=12, chunk=32)


def measure(options: Options) -> Iterator[Row]:
    sizes = ON_CPU if options.arguments.device == "cpu" else ON_GPU
    if sizes.device == "cuda" and not torch.cuda.is_available():
        yield skipped("exposed transfer, tokens, blocks", "", "needs a CUDA device")
        return
    pool = sizes.pool(2 * MOVED_BLOCKS)
    yield from changed_rows(pool)
    with (
        running_node(slot_count=6 * sizes.prompt_blocks, block_bytes=pool.block_bytes) as store,
        Workers(sizes, store) as workers,
    ):
        yield from _handed_over(sizes, workers, options.rounds(ROUNDS))


def _handed_over(sizes: Sizes, workers: "Workers", rounds: int) -> Iterator[Row]:
    exposed_ms, layer_ms, alike_percent = [], [], []
    for index in range(WARM_UPS + rounds):
        prompt = random.Random(index).choices(range(sizes.architecture.vocab_size), k=sizes.prompt)
        answer = workers.answer(f"pd{index}", prompt, prefill=PREFILL)
        alone = workers.answer(f"alone{index}", prompt, prefill=DECODE)
        if index < WARM_UPS:
            continue
        exposed_ms.append(answer.timing.handoff_us / 1000)
        layer_ms.append(answer.timing.step_us / 1000 / sizes.architecture.layer_count)
        alike_percent.append(100.0 * (answer.tokens == alone.tokens))
    yield row(
        f"exposed transfer, {sizes.prompt} tokens",
        exposed_ms,
        "ms",
        reference="one layer of the prefill",
        reference_samples=layer_ms,
        bar=at_most(1.0, of="ratio"),
    )
    yield row("answers like those of one process", alike_percent, "%", bar=at_least(100), at=0.0)


def changed_rows(pool: KvPool) -> Iterator[Row]:
    """Blocks of random bits there and back, by way of an arena and by way of a disk."""
    with running_node(slot_count=MOVED_BLOCKS, block_bytes=pool.block_bytes) as store:
        yield _changed("arena", _moved(pool, store))
    yield _changed("SSD", _moved_below(pool))


def _changed(way: str, blocks: int) -> Row:
    return row(f"blocks changed by way of the {way}", [float(blocks)], "blocks", bar=at_most(0))


def _moved_below(pool: KvPool) -> int:
    """As ``_moved``, by way of a store that reads every block from its disk."""
    with tempfile.TemporaryDirectory() as directory:
        disk = ("--ssd-directory", directory, "--ssd-bytes", str(SSD_BYTES))
        with (
            running_node(
                *(*disk, "--ssd-write", "write_through"),
                slot_count=MOVED_BLOCKS,
                block_bytes=pool.block_bytes,
            ) as store,
            contextlib.closing(Client("bench")(store)) as client,
            contextlib.closing(StoreAdmin(store, host=local_host_id())) as admin,
        ):

            def to_disk() -> None:
                until_s = time.monotonic() + ANSWER_S_MAX
                while client.stat().ssd["blocks"] < MOVED_BLOCKS:
                    assert time.monotonic() < until_s, f"not on disk: {client.stat().ssd}"
                    time.sleep(0.01)  # between two questions
                evicted = admin.evict_all()
                assert evicted == MOVED_BLOCKS, f"{evicted} of {MOVED_BLOCKS} left the arena"

            changed = _moved(pool, store, between=to_disk)
            read = client.stat().ssd["read"]
            assert read == MOVED_BLOCKS, f"{read} of {MOVED_BLOCKS} blocks came from the disk"
            return changed


def _moved(pool: KvPool, store: Address, *, between: Callable[[], None] = lambda: None) -> int:
    """The first half of the pool to the store, and from there into the second: how many blocks
    are not what they were."""
    first = tuple(BlockId(block) for block in range(MOVED_BLOCKS))
    second = tuple(BlockId(block + MOVED_BLOCKS) for block in first)
    bits = pool.tensor.view(torch.int16)
    bits[:MOVED_BLOCKS] = torch.randint_like(bits[:MOVED_BLOCKS], -(1 << 15), 1 << 15)
    keys = block_keys(NAMESPACE, range(1, MOVED_BLOCKS * BLOCK_TOKENS + 1), BLOCK_TOKENS)
    mover = Mover(pool, Client("mover"), store, threaded=False)
    bits[MOVED_BLOCKS:] = 0  # nothing of an earlier way passes for this one's
    if pool.tensor.is_cuda:
        torch.cuda.synchronize()  # a block is read beside whatever still runs
    put = carried_out(mover, Put(store, keys, first)).count
    between()
    restored = carried_out(mover, Restore(store, keys, 0, second)).count
    mover.close()
    assert put == restored == MOVED_BLOCKS, f"{put} and {restored} blocks of {MOVED_BLOCKS} moved"
    return sum(not torch.equal(bits[a], bits[b]) for a, b in zip(first, second, strict=True))


def carried_out(mover: Mover, move: Move) -> Moved:
    mover.submit(move)
    (moved,) = mover.collect()
    if moved.error is not None:
        raise moved.error
    return moved


class Client:
    """Makes a process's connections to stores."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def __call__(self, address: Address) -> StoreClient:
        return StoreClient(address, host=local_host_id(), owner=self._owner)


# ── the workers, seen from here ──────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    timing: Timing


class Workers:
    """Both processes, and as much of a router and a gateway as they need."""

    def __init__(self, sizes: Sizes, store: Address) -> None:
        self._sizes = sizes
        self._store = store
        self._pipes: dict[WorkerId, Connection] = {}
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> "Workers":
        spawn = multiprocessing.get_context("spawn")
        for name in (PREFILL, DECODE):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(name, theirs, self._store, self._sizes))
            process.start()
            theirs.close()
            self._ending.callback(process.join)
            self._ending.callback(ours.send_bytes, _END)
            self._pipes[name] = ours
        for name, pipe in self._pipes.items():
            assert pipe.poll(ANSWER_S_MAX), f"{name} does not start; its own words are above"
            pipe.recv_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def answer(self, name: str, prompt: list[int], *, prefill: WorkerId) -> Answer:
        """Computed by ``prefill`` and decoded by the decode worker, whose cache knows neither's
        prompt from the other's: the keys are salted by who computes it."""
        asked = request(name, tuple(prompt), max_tokens=self._sizes.answer)
        route = Route(prefill, DECODE, NOWHERE, self._store)
        asked = replace(asked, tenant=prefill)
        self._send(prefill, Dispatch(asked, route, Timing(), cached_tokens=0))
        tokens: list[int] = []
        while True:
            delta = self._next_delta()
            tokens += [token.token for token in delta.tokens]
            if delta.finish is not None:
                assert delta.timing is not None
                return Answer(tokens, delta.timing)

    def _next_delta(self) -> TokenDelta:
        while True:
            ready = wait(list(self._pipes.values()), ANSWER_S_MAX)
            assert ready, f"no worker said anything for {ANSWER_S_MAX} s"
            pipe = ready[0]
            assert isinstance(pipe, Connection)
            match MESSAGES.decode(pipe.recv_bytes()):
                case Handoff() as handoff:
                    self._send(DECODE, handoff)
                case TokenDelta() as delta:
                    return delta
                case WorkerFailed() as failed:
                    raise RuntimeError(f"a worker gave a request back: {failed}")

    def _send(self, worker: WorkerId, message: Dispatch | Handoff) -> None:
        self._pipes[worker].send_bytes(MESSAGES.encode(message))


# ── a worker's process ───────────────────────────────────────────────────────────────────────────


def work(name: WorkerId, pipe: Connection, store: Address, sizes: Sizes) -> None:
    """Takes messages from ``pipe`` until an empty one comes, and says its own there."""
    saying = threading.Lock()  # the engine's thread speaks, and the mover's

    def say(message: Handoff | TokenDelta | WorkerFailed) -> None:
        with saying:
            pipe.send_bytes(MESSAGES.encode(message))

    def emit(outputs: list[Output], _: Load) -> None:
        for output in outputs:
            match output:
                case ToDecode(_, message) | ToGateway(_, message):
                    say(message)
                case ToRouter(WorkerFailed() as failed):
                    say(failed)

    torch.set_num_threads(1)  # on a CPU three processes share its cores
    block_count = 4 * sizes.prompt_blocks
    device = torch.device(sizes.device)
    runner = random_runner(sizes.architecture, device, block_count=block_count, running_max=8)
    workplace = Workplace(
        worker=name,
        runner=runner,
        mover=Mover(runner.pool, Client(name), store, announce=lambda out: say(out.message)),
        tokenizer=NoText(),
        namespace=NAMESPACE,
        store=StoreConfig(offload=False),
    )
    streams = Streams(workplace)
    prompts = Prompts(workplace, keep=streams.keep)
    settings = PoolConfig(chunk_tokens=sizes.chunk, running_max=8)
    loop = EngineLoop(workplace, runner, settings, prompts=prompts, streams=streams)
    engine = EngineThread(loop, emit, name=name)
    # The mover connects on its own thread; a ticket may name only a reader that is there.
    present = Client(name)(store)
    pipe.send_bytes(b"ready")
    while data := pipe.recv_bytes():
        engine.submit(MESSAGES.decode(data))
    engine.stop(timeout_s=10.0)
    present.close()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")


if __name__ == "__main__":
    run("pd_gpu", measure, add_arguments=add_arguments)
