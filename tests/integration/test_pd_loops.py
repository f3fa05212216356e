"""Prefill and decode loops on threads, with a real model, real store nodes and nothing else.

The router and the gateway are a dozen lines here (``Stage``): deliver, resume what is parked on the
other decode worker, submit again what failed. No Ray, no sockets but the stores' own.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from operator import eq
from pathlib import Path

import pytest
import tokenizers
from tokenizers.models import WordLevel

from pdserve.config import ModelConfig
from pdserve.ids import HostId
from pdserve.lifecycle import Phase
from pdserve.messages import (
    Cancel,
    ChunkDone,
    Preempt,
    Progress,
)
from pdserve.model.packed_pool import packed_pool
from pdserve.text.tokenizer import Tokenizer
from tests.integration.pd_stage import (
    BLOCK_TOKENS,
    TIMEOUT_S,
    VOCABULARY,
    Alone,
    Node,
    Stage,
    block_bytes,
    chunks_of,
    request,
    runner_of,
    wait_store_idle,
)
from tests.models.small import write_small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_small_model(tmp_path_factory.mktemp("model"), layers=2, hidden=64)
    return ModelConfig(source=str(directory), device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    hf = tokenizers.Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    hf.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(hf, eos_token_ids=(), bos_token_id=None, chat_template=None)


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


@pytest.mark.parametrize("shared_memory", [True, False])
def test_blocks_may_be_packed_on_their_way(
    model: ModelConfig, tokenizer: Tokenizer, tmp_path: Path, *, shared_memory: bool
) -> None:
    """Answers are close to what they would be: here they have the right length and, of a model
    whose choices are clear, mostly the same tokens."""
    runner = runner_of(model, 256)
    packed = packed_pool(runner.pool, runner.architecture, "int8").block_bytes
    node = Node(tmp_path / "d", packed, slots=600, tcp=True)
    stage = Stage(model, tokenizer, node.address, codec="int8")
    stage.worker("p0", node.address, shared_memory=shared_memory)
    stage.worker("d0", node.address, shared_memory=shared_memory)
    asked = [request(f"r{i}", 1 + 37 * i, max_tokens=12) for i in range(4)]
    for one in asked:
        stage.submit(one)
    stage.wait_finished()
    alone = Alone(model)
    right = total = 0
    for one in asked:
        got, expected = stage.got[one.request], alone.answer(one)
        assert len(got) == len(expected)
        assert got[0] == expected[0]  # drawn before anything was packed
        right += sum(map(eq, got, expected))
        total += len(expected)
    assert right > 0.8 * total
    blocks = sum(-(-one.prompt_tokens // BLOCK_TOKENS) for one in asked)
    assert stage.count("p0", "bytes_pushed") == blocks * packed < blocks * block_bytes(model)
    assert stage.count("d0", "bytes_restored") == blocks * packed
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
