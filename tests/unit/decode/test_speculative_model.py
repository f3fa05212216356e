"""Drafts on a real model: to the bit what it says without them."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from pdserve.cluster.worker_parts import make_loop
from pdserve.config import PoolConfig, StoreConfig
from pdserve.engine.mover import Mover
from pdserve.engine.outputs import ToGateway
from pdserve.ids import WorkerId
from pdserve.messages import Dispatch, Request, Route, Sampling, Timing, Token
from pdserve.model.runner import ModelRunner
from tests.models.small import write_small_model
from tests.unit.engine.fakes import FakeStore, address
from tests.unit.engine.rig import NAMESPACE, TOKENIZER, request
from tests.unit.model.conftest import RunnerOf, _compiled, one_thread, runner_of

__all__ = ["_compiled", "one_thread", "runner_of"]

HERE = WorkerId("w")
PROMPT = [40, 77, 123, 61, 200, 88, 140, 55] * 5
ANSWER_TOKENS = 100


def answers(
    runner: ModelRunner, asked: list[Request], speculation: Literal["off", "prompt_lookup"]
) -> tuple[dict[str, list[Token]], dict[str, int]]:
    """One worker that does both; the pool holds what somebody else left there."""
    runner.pool.tensor.normal_()
    store = FakeStore()
    loop = make_loop(
        worker=HERE,
        runner=runner,
        mover=Mover(runner.pool, lambda _address: store, address("w"), threaded=False),
        tokenizer=TOKENIZER,
        namespace=NAMESPACE,
        settings=PoolConfig(speculation=speculation, chunk_tokens=16),
        store=StoreConfig(offload=False),
        clock=lambda: 0,  # in no time all drafts that are offered pay
    )
    for one in asked:
        route = Route(HERE, HERE, address("w"), address("w"))
        loop.handle(Dispatch(one, route, Timing()))
    said: dict[str, list[Token]] = {one.request: [] for one in asked}
    while loop.busy():
        for output in loop.step():
            if isinstance(output, ToGateway):
                said[output.message.request] += output.message.tokens
    assert loop.pool.free_count == loop.pool.block_count
    return said, dict(loop.load().counters)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_and_logprobs_are_the_same_to_the_bit(
    tmp_path: Path, runner_of: RunnerOf, kernels: str, dtype: torch.dtype
) -> None:
    """Greedy and drawn, three streams at once, the later ones' prompts beside the first's steps."""
    runner = runner_of(write_small_model(tmp_path), kernels=kernels, dtype=dtype, block_count=40)
    samplings = [
        Sampling(temperature=0.0, logprobs=2),
        Sampling(temperature=0.5, top_p=0.9, logprobs=0),
        Sampling(temperature=0.3, repetition_penalty=1.05, frequency_penalty=0.02, logprobs=1),
    ]
    asked = [
        request(
            f"r{index}",
            [*PROMPT, *range(100, 100 + 20 * index)],
            sampling=sampling,
            max_tokens=ANSWER_TOKENS,
            choice=index,
        )
        for index, sampling in enumerate(samplings)
    ]
    without, plain_counters = answers(runner, asked, "off")
    with_drafts, counters = answers(runner, asked, "prompt_lookup")
    assert with_drafts == without  # logprobs are in it: floats that are equal or are not
    assert all(len(tokens) == ANSWER_TOKENS for tokens in without.values())
    assert counters["tokens_accepted"] > 30
    assert counters["tokens_drafted"] > counters["tokens_accepted"]
    assert counters["steps"] < plain_counters["steps"]
