"""Workers' loops in this process beside a real store node, and just enough of a router and a
gateway to follow requests through them."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pdserve.cluster.worker_parts import make_loop
from pdserve.config import ModelConfig, PoolConfig, StoreConfig
from pdserve.engine.mover import Blocks, Mover
from pdserve.engine.outputs import Load, Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.thread import EngineThread
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.messages import (
    Address,
    ChunkDone,
    Dispatch,
    Parked,
    Request,
    Resume,
    Route,
    Sampling,
    ServiceClass,
    Stop,
    Timing,
    TokenDelta,
    WorkerFailed,
)
from pdserve.model.load import load_runner
from pdserve.model.packed_pool import packed_pool
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.sampler import SamplerRow, sample
from pdserve.text.tokenizer import Tokenizer

BLOCK_TOKENS = 16


VOCABULARY = 512


NAMESPACE = namespace_digest(model="small")


TIMEOUT_S = 60.0


GATEWAY = Address(HostId("gateway"), "", "")


SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.1, top_p=0.95),
    Sampling(temperature=0.9, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2),
    Sampling(temperature=0.0, no_repeat_ngram_size=2),
)


def runner_of(model: ModelConfig, block_count: int = 256) -> ModelRunner:
    return load_runner(model, block_count=block_count, pool_bytes=1, threads=1)


class Node:
    """A store node process."""

    def __init__(self, directory: Path, block_bytes: int, *, slots: int, tcp: bool) -> None:
        directory.mkdir(mode=0o700)
        command = [sys.executable, "-m", "pdserve.kvstore.node", "--directory", str(directory)]
        command += ["--arena-bytes", str(slots * (block_bytes + 4096))]
        command += ["--block-bytes", str(block_bytes)]
        command += ["--tcp-host", "127.0.0.1"] if tcp else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        said = json.loads(self.process.stdout.readline())
        self.address = Address(**said["address"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        self.process.stdout.close()


class Stage:
    """Workers, and just enough of a router and a gateway to follow requests through them."""

    def __init__(
        self, model: ModelConfig, tokenizer: Tokenizer, store: Address, *, codec: str = "plain"
    ) -> None:
        self.model = model
        self.codec = codec
        self.tokenizer = tokenizer
        self.store = store  # of decode's host
        self.engines: dict[str, EngineThread] = {}
        self.loads: dict[str, Load] = {}
        self.requests: dict[RequestId, Request] = {}
        self.prefill_of: dict[RequestId, str] = {}
        self.got: dict[RequestId, list[int]] = {}
        self.said: list[object] = []
        self.finished: set[RequestId] = set()
        self.resume_on = "d0"
        self.on_chunk: Callable[[ChunkDone], None] = lambda chunk: None
        self.changed = threading.Condition()

    def worker(
        self,
        name: str,
        store: Address,
        *,
        blocks: int = 256,
        host: HostId | None = None,
        corrupt: Callable[[memoryview], None] | None = None,
        shared_memory: bool = True,
        runner: ModelRunner | None = None,
        step_ahead: bool = False,
    ) -> None:
        runner = runner or runner_of(self.model, blocks)

        def client(address: Address) -> StoreClient:
            return StoreClient(
                address,
                host=host or store.host,
                owner=name,
                corrupt=corrupt,
                shared_memory=shared_memory,
            )

        blocks_of_store: Blocks = runner.pool
        if self.codec != "plain":
            blocks_of_store = packed_pool(runner.pool, runner.architecture, self.codec)
        loop = make_loop(
            worker=WorkerId(name),
            runner=runner,
            mover=Mover(blocks_of_store, client, store),
            tokenizer=self.tokenizer,
            namespace=NAMESPACE,
            settings=PoolConfig(chunk_tokens=64, mixed_chunk_tokens=32, step_ahead=step_ahead),
            store=StoreConfig(),
        )
        self.engines[name] = EngineThread(
            loop, lambda outputs, load: self.deliver(name, outputs, load), name=name
        )

    def submit(self, request: Request, *, prefill: str = "p0", decode: str = "d0") -> None:
        self.requests[request.request] = request
        self.got.setdefault(request.request, [])
        self.prefill_of[request.request] = prefill
        address = Address(HostId(decode), "", "")
        route = Route(WorkerId(prefill), WorkerId(decode), address, self.store)
        self.engines[prefill].submit(Dispatch(request, route, Timing()))

    def deliver(self, name: str, outputs: list[Output], load: Load) -> None:
        """On the engine threads."""
        with self.changed:
            self.loads[name] = load
            for output in outputs:
                match output:
                    case ToDecode(address, handoff):
                        self.engines[address.host].submit(handoff)
                    case ToGateway(_, delta):
                        self.hear(delta)
                    case ToRouter(message):
                        self.said.append(message)
                        self.route(message)
            self.changed.notify_all()

    def hear(self, delta: TokenDelta) -> None:
        got = self.got[delta.request]
        if delta.attempt != self.requests[delta.request].attempt:
            return
        assert delta.offset == len(got), f"token {delta.offset} follows {len(got)} tokens"
        got += [token.token for token in delta.tokens]
        if delta.finish is not None:
            self.finished.add(delta.request)

    def route(self, message: object) -> None:
        match message:
            case Parked(handoff):
                decode = WorkerId(self.resume_on)
                resumed = replace(handoff, route=replace(handoff.route, decode=decode))
                self.engines[self.resume_on].submit(Resume(resumed))
            case ChunkDone():
                self.on_chunk(message)
            case WorkerFailed(request=name):
                self.submit_again(name)

    def submit_again(self, name: RequestId) -> None:
        request = self.requests[name]
        tokens = request.tokens[: request.prompt_tokens] + tuple(self.got[name])
        keys = block_keys(NAMESPACE, tokens, BLOCK_TOKENS)
        again = replace(request, attempt=request.attempt + 1, tokens=tokens, block_keys=keys)
        self.submit(again, prefill=self.prefill_of[name])

    def wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(until, TIMEOUT_S), self.said
        for name, engine in self.engines.items():
            assert engine.error is None, f"{name}: {engine.error!r}"

    def wait_finished(self) -> None:
        self.wait(lambda: self.finished == set(self.requests))

    def count(self, name: str, counter: str) -> int:
        return self.loads[name].counters.get(counter, 0)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.stop(timeout_s=20)
            assert engine.error is None


def block_bytes(model: ModelConfig) -> int:
    return runner_of(model, 2).pool.block_bytes


def wait_store_idle(address: Address) -> None:
    """Nobody is connected any more: nothing may be held."""
    client = StoreClient(address, host=address.host, owner="test")
    stat = client.stat()
    client.close()
    assert (stat.claims, stat.tickets, stat.slots_reserved, stat.slots_pinned) == (0, 0, 0, 0)


def request(name: str, length: int, *, max_tokens: int = 24, kind: int = 0) -> Request:
    seed = sum(name.encode())
    generator = torch.Generator().manual_seed(seed)
    tokens = tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())
    return Request(
        request=RequestId(name),
        attempt=0,
        choice=0,
        model="small",
        tokens=tokens,
        prompt_tokens=length,
        block_keys=block_keys(NAMESPACE, tokens, BLOCK_TOKENS),
        tenant="",
        service_class=ServiceClass.STANDARD,
        sampling=SAMPLINGS[kind % len(SAMPLINGS)],
        stop=Stop(max_tokens=max_tokens),
        seed=seed,
        deadline_unix_ms=0,
        reply_to=GATEWAY,
    )


class Alone:
    """What the bare model answers: one sequence, the whole prompt in one run, no store."""

    def __init__(self, model: ModelConfig) -> None:
        self.runner = runner_of(model)

    def answer(self, asked: Request) -> list[int]:
        tokens, start = list(asked.tokens), 0
        while len(tokens) < asked.prompt_tokens + asked.stop.max_tokens:
            logits = self.runner.step([Run(tokens[start:], start, range(256))])
            index = len(tokens) - asked.prompt_tokens
            row = SamplerRow(asked.sampling, asked.seed, 0, index, tokens, asked.prompt_tokens)
            start = len(tokens)
            tokens.append(sample(logits, [row])[0].token)
        return tokens[asked.prompt_tokens :]


def chunks_of(chunks: list[ChunkDone], name: str) -> list[ChunkDone]:
    return [chunk for chunk in chunks if chunk.request == name]
