"""Prefill and decode loops on threads, with a real model, real store nodes and nothing else.

The router and the gateway are a dozen lines here (``Stage``): deliver, resume what is parked on the
other decode worker, submit again what failed. No Ray, no sockets but the stores' own.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel

from pdserve.cluster.worker_parts import make_loop
from pdserve.config import ModelConfig, PoolConfig, StoreConfig
from pdserve.engine.mover import Mover
from pdserve.engine.outputs import Load, Output, ToDecode, ToGateway, ToRouter
from pdserve.engine.thread import EngineThread
from pdserve.ids import HostId, RequestId, WorkerId
from pdserve.kvstore.client import StoreClient
from pdserve.kvstore.keys import block_keys, namespace_digest
from pdserve.lifecycle import Phase
from pdserve.messages import (
    Address,
    Cancel,
    ChunkDone,
    Dispatch,
    Parked,
    Preempt,
    Progress,
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
from pdserve.model.runner import ModelRunner, Run
from pdserve.model.sampler import SamplerRow, sample
from pdserve.text.tokenizer import Tokenizer
from tests.models.small import write_small_model

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_small_model(tmp_path_factory.mktemp("model"), layers=2, hidden=64)
    return ModelConfig(source=str(directory), device="cpu", dtype="bfloat16")


def runner_of(model: ModelConfig, block_count: int = 256) -> ModelRunner:
    return load_runner(model, block_count=block_count, pool_bytes=1, threads=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    hf = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    hf.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(hf, eos_token_ids=(), bos_token_id=None, chat_template=None)


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

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer, store: Address) -> None:
        self.model = model
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

        loop = make_loop(
            worker=WorkerId(name),
            runner=runner,
            mover=Mover(runner.pool, client, store),
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


@pytest.fixture
def node(model: ModelConfig, tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "d", block_bytes(model), slots=600, tcp=True)
    yield node
    node.close()


@pytest.fixture
def stage(model: ModelConfig, tokenizer: Tokenizer, node: Node) -> Iterator[Stage]:
    stage = Stage(model, tokenizer, node.address)
    yield stage
    stage.close()
    wait_store_idle(node.address)


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


@pytest.fixture(scope="module")
def alone(model: ModelConfig) -> Alone:
    return Alone(model)


def test_answers_are_those_of_the_bare_model(stage: Stage, node: Node, alone: Alone) -> None:
    stage.worker("p0", node.address)
    stage.worker("d0", node.address)
    asked = [request(f"r{i}", 1 + 37 * i, kind=i) for i in range(9)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    for one in asked:
        assert stage.got[one.request] == alone.answer(one), one.request
    blocks = sum(-(-one.prompt_tokens // BLOCK_TOKENS) for one in asked)
    assert stage.count("p0", "bytes_pushed") == blocks * block_bytes(stage.model)
    assert stage.count("d0", "bytes_restored") == blocks * block_bytes(stage.model)
    assert stage.count("p0", "tokens_generated") == len(asked)
    assert stage.count("d0", "prompt_tokens_computed") == 0


def test_steps_launched_ahead_of_their_tokens_give_the_same_ones(
    stage: Stage, node: Node, alone: Alone
) -> None:
    stage.worker("p0", node.address)
    stage.worker("d0", node.address, step_ahead=True)
    asked = [request(f"r{i}", 30 + 17 * i, max_tokens=10 + 9 * i) for i in range(4)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    for one in asked:
        assert stage.got[one.request] == alone.answer(one), one.request


def test_blocks_of_8_bits_are_handed_over_as_they_are(
    model: ModelConfig, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    coded = replace(model, kv_dtype="int8")
    node = Node(tmp_path / "d", block_bytes(coded), slots=600, tcp=True)
    stage = Stage(coded, tokenizer, node.address)
    stage.worker("p0", node.address)
    stage.worker("d0", node.address)
    asked = [request(f"r{i}", 1 + 37 * i, kind=i) for i in range(3)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    alone = Alone(coded)
    for one in asked:
        assert stage.got[one.request] == alone.answer(one), one.request
    blocks = sum(-(-one.prompt_tokens // BLOCK_TOKENS) for one in asked)
    assert stage.count("d0", "bytes_restored") == blocks * block_bytes(coded)
    # Heads of 16 channels: 32 bytes in bfloat16, 18 in 8 bits with a scale.
    assert block_bytes(coded) * 32 == block_bytes(model) * 18
    stage.close()
    node.close()


def test_between_two_hosts_blocks_go_over_tcp(
    stage: Stage, node: Node, alone: Alone, model: ModelConfig, tmp_path: Path
) -> None:
    """Prefill has a store and a host of its own, and may not share memory with decode's."""
    own = Node(tmp_path / "p", block_bytes(model), slots=200, tcp=False)
    far = HostId("another-host")
    stage.worker("p0", replace(own.address, tcp=node.address.tcp), host=far)
    stage.worker("d0", node.address)
    asked = [request(f"r{i}", 20 + 61 * i, kind=i) for i in range(4)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    for one in asked:
        assert stage.got[one.request] == alone.answer(one)
    assert stage.count("p0", "remote_bytes") > 0
    own.close()


@pytest.mark.parametrize("dies", [False, True])
def test_a_prompt_goes_on_at_another_worker_from_the_chunk_that_it_had(
    stage: Stage, node: Node, alone: Alone, *, dies: bool
) -> None:
    """Preempted, or left by a worker that dies: what it committed under its ticket is stored."""
    stage.worker("p0", node.address)
    stage.worker("p1", node.address)
    stage.worker("d0", node.address)
    asked = request("long", 700)

    def preempt(chunk: ChunkDone) -> None:
        if chunk.computed_tokens == 128:
            assert not dies, "this ends the worker"
            stage.engines["p0"].submit(Preempt(chunk.request, chunk.attempt, Phase.PREFILLING))

    stage.on_chunk = preempt
    stage.submit(asked)
    if dies:
        stage.engines.pop("p0")._thread.join(TIMEOUT_S)
    else:
        stage.wait(
            lambda: any(isinstance(m, Progress) and m.event == "preempted" for m in stage.said)
        )
    stage.on_chunk = lambda chunk: None
    stage.submit(asked, prefill="p1")
    stage.wait_finished()
    assert stage.got[asked.request] == alone.answer(asked)
    computed = [stage.count(name, "prompt_tokens_computed") for name in ("p0", "p1")]
    # Who dies takes the chunk along whose push had not begun.
    assert sum(computed) in ((700, 764) if dies else (700,))
    assert all(computed)


def test_streams_without_room_are_parked_and_go_on_elsewhere(
    stage: Stage, node: Node, alone: Alone
) -> None:
    stage.worker("p0", node.address)
    stage.worker("d0", node.address, blocks=32)  # room for four of the six at their full length
    stage.worker("d1", node.address)
    stage.resume_on = "d1"
    asked = [request(f"r{i}", 32, max_tokens=96, kind=i) for i in range(6)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    for one in asked:
        assert stage.got[one.request] == alone.answer(one)
    assert stage.count("d0", "parked") >= 1
    assert stage.count("d1", "resumed") == stage.count("d0", "parked")


@pytest.mark.parametrize("role", ["p", "d"])
def test_a_worker_of_either_role_does_both(
    stage: Stage, node: Node, alone: Alone, role: str
) -> None:
    """Long prompts arrive while streams run: chunks and tokens share steps, no bit changes."""
    worker = f"{role}0"
    stage.worker(worker, node.address)
    streams = [request(f"s{i}", 1 + 13 * i, max_tokens=96, kind=i) for i in range(4)]
    for one in streams:
        stage.submit(one, prefill=worker, decode=worker)
    stage.wait(lambda: all(stage.got[one.request] for one in streams))
    late = [request(f"l{i}", 100 + 150 * i, kind=i) for i in range(3)]
    for one in late:
        stage.submit(one, prefill=worker, decode=worker)
    stage.wait_finished()
    for one in (*streams, *late):
        assert stage.got[one.request] == alone.answer(one), one.request
    assert stage.count(worker, "bytes_restored") == 0
    chunks = [message for message in stage.said if isinstance(message, ChunkDone)]
    beside = [b.computed_tokens - a.computed_tokens for a, b in pairwise(chunks_of(chunks, "l2"))]
    assert 32 in beside, "no chunk of the late prompt was computed beside a stream"


def chunks_of(chunks: list[ChunkDone], name: str) -> list[ChunkDone]:
    return [chunk for chunk in chunks if chunk.request == name]


def test_a_stream_preempted_by_message_goes_on_elsewhere(
    stage: Stage, node: Node, alone: Alone
) -> None:
    stage.worker("p0", node.address)
    stage.worker("d0", node.address)
    stage.worker("d1", node.address)
    stage.resume_on = "d1"
    asked = [request(f"r{i}", 40 + i, max_tokens=200, kind=i) for i in range(2)]
    stage.submit(asked[0])  # handed over
    stage.submit(asked[1], prefill="d0", decode="d0")  # kept
    stage.wait(lambda: all(len(stage.got[one.request]) >= 20 for one in asked))
    for one in asked:
        stage.engines["d0"].submit(Preempt(one.request, one.attempt, Phase.DECODING))
    stage.wait_finished()
    for one in asked:
        assert stage.got[one.request] == alone.answer(one)
    assert (stage.count("d0", "parked"), stage.count("d1", "resumed")) == (2, 2)


def test_a_flipped_byte_is_counted_and_the_answer_right(
    stage: Stage, node: Node, alone: Alone
) -> None:
    seen = 0

    def flip_third(data: memoryview) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            data[len(data) // 2] ^= 0x40

    stage.worker("p0", node.address, corrupt=flip_third)
    stage.worker("d0", node.address)
    asked = request("r", 100)
    stage.submit(asked)
    stage.wait_finished()
    assert stage.got[asked.request] == alone.answer(asked)
    assert stage.count("d0", "checksum_failures") == 1


def test_cancelled_requests_leave_nothing(stage: Stage, node: Node) -> None:
    stage.worker("p0", node.address)
    stage.worker("d0", node.address)
    asked = [request(f"r{i}", 50 + 90 * i, max_tokens=400) for i in range(4)]
    for one in asked:
        stage.submit(one)
    stage.wait(lambda: bool(stage.got[asked[0].request]))
    for name in ("p0", "d0"):
        for one in asked:
            stage.engines[name].submit(Cancel(one.request))
    stage.wait(lambda: stage.loads["p0"].running + stage.loads["p0"].waiting == 0)
    for one in asked:  # a hand-off that crossed its cancel: the router would say it again
        stage.engines["d0"].submit(Cancel(one.request))
    stage.wait(lambda: stage.loads["d0"].running + stage.loads["d0"].waiting == 0)
    stage.wait(lambda: all(load.free_blocks == 256 for load in stage.loads.values()))
