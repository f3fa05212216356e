"""Keys, and the end of a hand-off: rows of ``bench.kvstore``.

A first token waits for the blocks of its prompt's last chunk. Measured is the time from the end of
that chunk's forward pass, sampling not begun, to the ticket's seal: with pushes as they are, layer
by layer beside the step, and with a push of whole blocks behind it, in turn. Both are the
production loop, the default model, and a node process on this host; a push of whole blocks is what
the loop does where it is told of no layers.
"""

import itertools
import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from bench.frame import Options, Row, at_most, interleave, row, skipped
from pdserve.cluster.worker_parts import make_loop
from pdserve.config import ModelConfig, PoolConfig, StoreConfig
from pdserve.engine.mover import Mover
from pdserve.engine.outputs import ToDecode
from pdserve.errors import ConfigError
from pdserve.ids import RequestId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import KeyChain, block_keys, namespace_digest
from pdserve.messages import (
    Address,
    Dispatch,
    Request,
    Route,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
)
from pdserve.model.load import load_runner
from pdserve.model.ops import LayersTold
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.source import locate
from pdserve.text.tokenizer import load_tokenizer
from pdserve.wire.hosts import local_host_id

NAMESPACE = namespace_digest(model="bench")
CHAIN_BLOCKS, CHAIN_BLOCK_TOKENS = 247, 512  # 126 k tokens, as in the bar
TURN_BLOCKS = 8
PROMPT_TOKENS = 2048
NODE_SLOTS = 3 * PROMPT_TOKENS // 16
EOS_FREE = 40_000  # random tokens are below


def chain_rows(options: Options) -> Iterator[Row]:
    """Hashing a long prompt, packed and not, and one more block of it."""
    dice = random.Random(1)
    tokens = [dice.randrange(EOS_FREE) for _ in range(CHAIN_BLOCKS * CHAIN_BLOCK_TOKENS)]
    packed = array("I", tokens)
    known = block_keys(NAMESPACE, tokens, CHAIN_BLOCK_TOKENS)[:-TURN_BLOCKS]

    def turn() -> float:
        chain = KeyChain(NAMESPACE, CHAIN_BLOCK_TOKENS, keys=known)
        return _us(lambda: chain.extend(tokens)) / TURN_BLOCKS

    samples = interleave(
        options.rounds(60),
        packed=lambda: _us(lambda: block_keys(NAMESPACE, packed, CHAIN_BLOCK_TOKENS)),
        listed=lambda: _us(lambda: block_keys(NAMESPACE, tokens, CHAIN_BLOCK_TOKENS)),
        turn=turn,
    )
    yield row("C12 keys of 126 k packed tokens", samples["packed"], "µs", bar=at_most(600))
    yield row("keys of 126 k tokens in a list", samples["listed"], "µs")
    yield row("C12 a turn's key per new block", samples["turn"], "µs", bar=at_most(10))


class Switched:
    """A runner that hears of layers, or not, and notes when a forward pass ended."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.architecture, self.pool, self.adapters = (
            runner.architecture,
            runner.pool,
            runner.adapters,
        )
        self.by_layers = True
        self.ended_s = 0.0

    def step(
        self, runs: Sequence[Run], drawn_R: Tensor | None = None, told: LayersTold | None = None
    ) -> Tensor:
        logits = self._runner.step(runs, drawn_R, told if self.by_layers else None)
        self.ended_s = time.perf_counter()
        return logits


def handoff_rows(options: Options, node: Address) -> Iterator[Row]:
    """``node``: of blocks of the default model, with room for ``NODE_SLOTS``."""
    config = ModelConfig(device="cpu")
    name = "last chunk's push exposed, 2,048 tokens"
    try:
        files = locate(config)
    except ConfigError as error:
        yield skipped(name, "ms", str(error))
        return
    runner = Switched(load_runner(config, block_count=2 * PROMPT_TOKENS // 16, pool_bytes=0))
    host, sealed_s = local_host_id(), list[tuple[float, ToDecode]]()
    writer, reader = WorkerId("prefill"), WorkerId("decode")
    mover = Mover(
        runner.pool,
        lambda store: StoreClient(store, host=host, owner=writer, warm=True),
        node,
        announce=lambda said: sealed_s.append((time.perf_counter(), said)),
    )
    settings = PoolConfig()
    loop = make_loop(
        worker=writer,
        runner=runner,
        mover=mover,
        tokenizer=load_tokenizer(files.path),
        namespace=NAMESPACE,
        settings=settings,
        store=StoreConfig(offload=False),
    )
    decode = StoreClient(node, host=host, owner=reader)
    stirred = threading.Event()
    loop.wake_by(stirred.set)
    numbers = itertools.count()

    def step_or_wait() -> None:
        stirred.clear()
        loop.step()
        if not loop.busy():  # else it would keep the interpreter from the mover
            stirred.wait(1)

    def exposed_ms(*, by_layers: bool, tokens: int) -> float:
        runner.by_layers = by_layers
        asked = _request(f"r{next(numbers)}", tokens)
        loop.handle(Dispatch(asked, Route(writer, reader, node, node), Timing()))
        while not sealed_s:
            step_or_wait()
        at_s, said = sealed_s.pop()
        decode.release(decode.adopt(said.message.ticket))
        while loop.load().running:
            step_or_wait()
        return (at_s - runner.ended_s) * 1000

    try:
        for by_layers in (True, False):  # every slot of the arena touched
            exposed_ms(by_layers=by_layers, tokens=PROMPT_TOKENS)
        samples = interleave(
            options.rounds(8),
            layers=lambda: exposed_ms(by_layers=True, tokens=PROMPT_TOKENS),
            whole=lambda: exposed_ms(by_layers=False, tokens=PROMPT_TOKENS),
            layers_tail=lambda: exposed_ms(by_layers=True, tokens=settings.chunk_tokens - 3),
            whole_tail=lambda: exposed_ms(by_layers=False, tokens=settings.chunk_tokens - 3),
        )
    finally:
        decode.close()
        loop.close()
    yield row(
        name,
        samples["layers"],
        "ms",
        reference="push of whole blocks",
        reference_samples=samples["whole"],
        bar=at_most(0.8, of="ratio"),
    )
    yield row(
        "the same, one chunk with a tail",
        samples["layers_tail"],
        "ms",
        reference="push of whole blocks",
        reference_samples=samples["whole_tail"],
    )


def _request(name: str, tokens: int) -> Request:
    dice = random.Random(name)
    prompt = tuple(dice.randrange(EOS_FREE) for _ in range(tokens))
    return Request(
        request=RequestId(name),
        attempt=0,
        choice=0,
        model="",
        tokens=prompt,
        prompt_tokens=tokens,
        block_keys=block_keys(NAMESPACE, prompt, 16),
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=Sampling(temperature=0.0),
        stop=Stop(max_tokens=8, ignore_eos=True),
        seed=1,
        deadline_unix_ms=0,
        reply_to=Address(local_host_id(), "", ""),
    )


def _us(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return (time.perf_counter() - began_s) * 1e6
