"""How much a decode step suffers from what a worker does beside it.

    python -m bench.engine_step STORE SINK ROUNDS PUSHED     JSON of two lists of milliseconds

One process and one model. In turn: the runner stepped in a plain loop; and a worker's loop in its
engine thread, whose tokens and reports leave over a socket from an asyncio loop, as a worker's do,
while a mover puts ``PUSHED`` KV blocks into the store every ``PUSH_EVERY_S``. Both have
``SEQUENCES`` sequences of equal lengths. A time is from the beginning of a step to the beginning
of the next, so what happens between two steps counts.

``STORE`` and ``SINK`` are addresses as JSON: of a store node, and of somebody who takes tokens.
Both are processes of their own, as in a cluster.
"""

import asyncio
import itertools
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.http_load import random_tokens
from bench.plain_loop import GREEDY, PlainLoop
from pdserve.cluster.worker_parts import make_loop
from pdserve.config import ModelConfig, PoolConfig, StoreConfig
from pdserve.engine.mover import Mover
from pdserve.engine.moves import Put
from pdserve.engine.outputs import Load, Loop, Output, ToGateway, ToRouter
from pdserve.engine.thread import EngineThread
from pdserve.ids import BlockId, WorkerId, new_request_id
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.messages import (
    Address,
    Handoff,
    Progress,
    Report,
    Request,
    Route,
    ServiceClass,
    Stop,
    Timing,
    Token,
    TokenBatch,
    TokenDelta,
)
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner
from pdserve.model.source import locate
from pdserve.text.tokenizer import load_tokenizer
from pdserve.wire.hosts import local_host_id
from pdserve.wire.postbox import Postbox

SEQUENCES = 64
STEPS_EACH_TURN = 20
ROUNDS_MAX = 16
BLOCK_TOKENS = 16
PROMPT_TOKENS = 64
"""And up to 15 more, so that not all sequences fill their blocks in the same step. They grow to
400 tokens; on average they have 230."""

ROOM_TOKENS = PROMPT_TOKENS + BLOCK_TOKENS + 100 + ROUNDS_MAX * STEPS_EACH_TURN
HALF_BLOCKS = SEQUENCES * -(-ROOM_TOKENS // BLOCK_TOKENS)

PUSH_EVERY_S = 0.256
"""With 32 blocks, 512 tokens: what one worker hands on that prefills 2,000 tokens/s."""

NAMESPACE = namespace_digest(bench="engine step")
WORKER = WorkerId("decode-bench")


@dataclass(frozen=True, slots=True)
class HalfPool:
    block_count: int
    block_tokens: int
    copy_block: Callable[[int, int], None]


class HalfRunner:
    """The runner with the first half of its pool: what the loop under test knows of it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.architecture = runner.architecture
        self.pool = HalfPool(HALF_BLOCKS, runner.pool.block_tokens, runner.pool.copy_block)
        self.adapters = runner.adapters
        self.step = runner.step


@dataclass(slots=True)
class GatedLoop:
    """A loop whose steps need a permit each once it is ``gated``; notes when each began."""

    loop: Loop
    gated: bool = False
    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    began_s: list[float] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)

    def step(self) -> list[Output]:
        if self.gated and not self.permits.acquire(blocking=False):
            self.waiting.set()
            self.permits.acquire()
        self.began_s.append(time.perf_counter())
        return self.loop.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


class Sender:
    """What a worker's shell does with the outputs of a step."""

    def __init__(self, sink: Address) -> None:
        self._sink = sink
        self._postbox = Postbox(host=local_host_id())
        self._loop = asyncio.get_running_loop()
        self._sequence = itertools.count()
        self.load: Load | None = None  # after the last step

    def emit(self, outputs: Sequence[Output], load: Load) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._send, outputs, load)

    def _send(self, outputs: Sequence[Output], load: Load) -> None:
        self.load = load
        deltas: dict[Address, list[TokenDelta]] = defaultdict(list)
        progress = []
        for output in outputs:
            match output:
                case ToGateway(address, delta):
                    deltas[address].append(delta)
                case ToRouter(Progress() as event):
                    progress.append(event)
        for address, batch in deltas.items():
            self._postbox.post(address, TokenBatch(WORKER, tuple(batch)))
        report = Report(
            WORKER,
            next(self._sequence),
            draining=False,
            running=load.running,
            waiting=load.waiting,
            free_blocks=load.free_blocks,
            progress=tuple(progress),
            blocks_added=load.blocks_added,
            blocks_removed=load.blocks_removed,
            counters=load.counters,
        )
        self._postbox.post(self._sink, report)

    async def close(self) -> None:
        await self._postbox.close()


async def main(store: Address, sink: Address, rounds: int, pushed_blocks: int) -> None:
    assert rounds <= ROUNDS_MAX
    runner = load_runner(ModelConfig(), block_count=2 * HALF_BLOCKS, pool_bytes=0)

    def connect(owner: str) -> Callable[[Address], StoreClient]:
        return lambda address: StoreClient(address, host=local_host_id(), owner=owner)

    loop = GatedLoop(
        make_loop(
            worker=WORKER,
            runner=HalfRunner(runner),
            mover=Mover(runner.pool, connect(WORKER), store),
            tokenizer=load_tokenizer(locate(ModelConfig()).path),
            namespace=NAMESPACE,
            settings=PoolConfig(running_max=SEQUENCES),
            store=StoreConfig(),
        )
    )
    sender = Sender(sink)
    engine = EngineThread(loop, sender.emit, name=WORKER)
    client = connect("prefill-bench")(store)
    while client.stat().connections < 2:  # the loop's own, without which its tickets have no reader
        await asyncio.sleep(0.01)
    for index in range(SEQUENCES):
        engine.submit(hand_over(client, store, sink, index))
    while sender.load is None or sender.load.running < SEQUENCES:
        await asyncio.sleep(0.01)
    loop.gated = True
    await asyncio.to_thread(loop.waiting.wait)
    plain = PlainLoop(runner, first_block=HALF_BLOCKS)
    generated = sender.load.counters.get("tokens_generated", 0) // SEQUENCES
    for index in range(SEQUENCES):
        plain.add(prompt_of(index, generated), room_tokens=ROOM_TOKENS)
    pusher = Mover(runner.pool, connect("pusher"), store)

    samples: dict[str, list[float]] = {"plain": [], "loop": []}
    for index in range(rounds):
        for name in list(samples) if index % 2 == 0 else reversed(samples):
            if name == "plain":
                samples[name] += await plain_turn(plain)
            else:
                samples[name] += await loop_turn(loop, pusher, pushed_blocks)
    print(json.dumps(samples), flush=True)

    loop.gated = False
    loop.permits.release()
    await asyncio.to_thread(engine.stop, timeout_s=10.0)
    pusher.close()
    await sender.close()
    client.close()


def prompt_of(index: int, more_tokens: int = 0) -> list[int]:
    return random_tokens(PROMPT_TOKENS + index % BLOCK_TOKENS + 1 + more_tokens, seed=index)


def hand_over(client: StoreClient, store: Address, sink: Address, index: int) -> Handoff:
    """What prefill would send; the KV is whatever lies in the arena, as only times matter."""
    tokens = prompt_of(index)
    kv_count = len(tokens) - 1
    keys = block_keys(NAMESPACE, tokens[:kv_count], BLOCK_TOKENS)
    request = Request(
        request=new_request_id(),
        attempt=0,
        choice=0,
        model="",
        tokens=tuple(tokens[:kv_count]),
        prompt_tokens=kv_count,
        block_keys=keys,
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=GREEDY,
        stop=Stop(max_tokens=ROOM_TOKENS, ignore_eos=True),
        seed=0,
        deadline_unix_ms=0,
        reply_to=sink,
    )
    tail = kv_count % BLOCK_TOKENS > 0
    ticket = client.open_ticket(
        request.request, 0, reader=WORKER, block_count=len(keys) + tail, wait_ms=1000
    )
    client.push(ticket, keys, 0, lambda _index, _out: None)
    if tail:
        client.push_tail(ticket, lambda _out: None)
    client.seal(ticket)
    return Handoff(
        request=request,
        route=Route(WorkerId("prefill-bench"), WORKER, sink, store),
        ticket=ticket,
        store=store,
        tokens=tuple(tokens),
        block_keys=keys,
        unsent=(Token(tokens[-1]),),
        timing=Timing(),
    )


async def plain_turn(plain: PlainLoop) -> list[float]:
    def steps() -> list[float]:
        began_s = []
        for _ in range(STEPS_EACH_TURN + 1):
            began_s.append(time.perf_counter())
            plain.decode()
        return periods_ms(began_s)

    return await asyncio.to_thread(steps)


async def loop_turn(loop: GatedLoop, pusher: Mover, pushed_blocks: int) -> list[float]:
    loop.began_s.clear()
    loop.waiting.clear()
    loop.permits.release(STEPS_EACH_TURN + 1)
    pushing = asyncio.create_task(push_regularly(pusher, pushed_blocks))
    await asyncio.to_thread(loop.waiting.wait)
    pushing.cancel()
    return periods_ms(loop.began_s)


def periods_ms(began_s: Sequence[float]) -> list[float]:
    """Without the first step, which finds cold caches."""
    return [(after - before) * 1000 for before, after in itertools.pairwise(began_s[1:])]


async def push_regularly(pusher: Mover, block_count: int) -> None:
    blocks = tuple(BlockId(HALF_BLOCKS + index) for index in range(block_count))
    while blocks:
        pusher.collect()
        tokens = random_tokens(block_count * BLOCK_TOKENS, seed=time.perf_counter_ns())
        pusher.submit(Put(pusher.local, block_keys(NAMESPACE, tokens, BLOCK_TOKENS), blocks))
        await asyncio.sleep(PUSH_EVERY_S)


if __name__ == "__main__":
    store_json, sink_json, rounds_text, pushed_text = sys.argv[1:]
    asyncio.run(
        main(
            Address(**json.loads(store_json)),
            Address(**json.loads(sink_json)),
            int(rounds_text),
            int(pushed_text),
        )
    )
