"""A model over two processes: the same answers, through the same loops and the same store.

What needs no second process is in ``tests/unit/model/test_parallel.py``.
"""

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pdserve.config import ModelConfig
from pdserve.engine.leader import Followers, load_leader
from pdserve.model.runner import ModelRunner, Run
from pdserve.text.tokenizer import Tokenizer
from tests.integration.pd_stage import (
    Alone,
    Node,
    Stage,
    request,
    wait_store_idle,
)
from tests.integration.test_pd_loops import tokenizer
from tests.models.small import write_small_model
from tests.unit.model.test_identity import draw_sequences, kv_of, run_in_company

__all__ = ["tokenizer"]  # a fixture

BLOCKS = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = write_small_model(tmp_path_factory.mktemp("model"))
    return ModelConfig(source=str(directory), device="cpu", dtype="float32")


def cut(model: ModelConfig, rank_count: int) -> tuple[ModelRunner, Followers]:
    return load_leader(
        model, rank_count=rank_count, part_count=2, block_count=BLOCKS, pool_bytes=0, threads=1
    )


@pytest.fixture(scope="module")
def split(model: ModelConfig) -> Iterator[ModelRunner]:
    runner, followers = cut(model, 2)
    yield runner
    (process,) = [follower.process for follower in followers._followers]
    followers.close()
    assert process.returncode == 0, "it had to be killed"


def test_two_processes_give_the_bits_of_one_that_has_both_parts(
    model: ModelConfig, split: ModelRunner
) -> None:
    """Alone there, in company here; and in between, blocks move from one to the other."""
    both, _ = cut(model, 1)
    chance = random.Random(3)
    sequences = draw_sequences(both, chance, count=4, longest=60)
    assert run_in_company([split, both], sequences, chance) > 1
    for sequence in sequences:
        assert kv_of((split, both)[sequence.home], sequence.blocks) == sequence.kv


def test_logits_are_those_of_the_whole_model_but_for_roundings(
    model: ModelConfig, split: ModelRunner
) -> None:
    alone = Alone(model)
    runs = [Run(list(range(7, 60)), 0, range(4)), Run([3, 1, 4], 0, [9], draft_count=2)]
    with pytest.raises(ValueError, match="at least one run"):
        split.step([])  # which the other process must not hear of
    torch.testing.assert_close(split.step(runs), alone.runner.step(runs), rtol=1e-5, atol=2e-4)


def test_what_two_processes_prefill_one_decodes_and_back(
    model: ModelConfig, split: ModelRunner, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Greedy and drawn; a worker of two processes and one of one, each with both parts."""
    single, _ = cut(model, 1)
    assert single.pool.block_bytes == split.pool.block_bytes
    there = [request(f"r{i}", 1 + 37 * i, kind=i) for i in range(4)]
    back = [replace(request(f"b{i}", 30 + 29 * i, kind=i), seed=i) for i in range(4)]
    with closing(Node(tmp_path / "d", split.pool.block_bytes, slots=600, tcp=False)) as node:
        with closing(Stage(model, tokenizer, node.address)) as stage:
            stage.worker("t0", node.address, runner=split)
            stage.worker("s0", node.address, runner=single)
            for one in there:
                stage.submit(one, prefill="t0", decode="s0")
            for one in back:
                stage.submit(one, prefill="s0", decode="t0")
            stage.wait_finished()
        wait_store_idle(node.address)
    alone = Alone(model)
    for one in (*there, *back):
        assert stage.got[one.request] == alone.answer(one), one.request
    for name in ("t0", "s0"):
        assert stage.count(name, "bytes_restored") > 0
        assert stage.count(name, "tokens_generated") > len(back)
