"""Drafts on a real model: to the bit what it says without them."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from pdserve.config import PoolConfig
from pdserve.messages import Request, Sampling, Token
from pdserve.model.runner import ModelRunner
from tests.models.small import write_small_model
from tests.unit.decode.whole_worker import answers, drawn_by, loop_of
from tests.unit.model.conftest import RunnerOf, _compiled, one_thread, runner_of

__all__ = ["_compiled", "one_thread", "runner_of"]

PROMPT = [40, 77, 123, 61, 200, 88, 140, 55] * 5
ANSWER_TOKENS = 100


def answered(
    runner: ModelRunner, asked: list[Request], speculation: Literal["off", "prompt_lookup"]
) -> tuple[dict[str, list[Token]], dict[str, int]]:
    settings = PoolConfig(speculation=speculation, chunk_tokens=16)
    # In no time all drafts that are offered pay.
    return answers(loop_of(runner, settings, clock=lambda: 0), asked)


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
    asked = drawn_by(samplings, PROMPT, max_tokens=ANSWER_TOKENS)
    without, plain_counters = answered(runner, asked, "off")
    with_drafts, counters = answered(runner, asked, "prompt_lookup")
    assert with_drafts == without  # logprobs are in it: floats that are equal or are not
    assert all(len(tokens) == ANSWER_TOKENS for tokens in without.values())
    assert counters["tokens_accepted"] > 30
    assert counters["tokens_drafted"] > counters["tokens_accepted"]
    assert counters["steps"] < plain_counters["steps"]
