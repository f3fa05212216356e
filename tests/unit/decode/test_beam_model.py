"""Beam search on a real model in float32: what a plain search over it and ``transformers`` find."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pdserve.config import PoolConfig
from pdserve.engine.outputs import ToGateway
from pdserve.ids import WorkerId
from pdserve.messages import Beams, Sampling
from pdserve.model.runner import ModelRunner, Run
from tests.models.beams import beam_search
from tests.models.reference import reference_model
from tests.models.small import write_small_model
from tests.unit.decode.whole_worker import dispatched, loop_of
from tests.unit.engine.rig import request
from tests.unit.model.conftest import RunnerOf, _compiled, one_thread, runner_of

__all__ = ["_compiled", "one_thread", "runner_of"]

HERE = WorkerId("w")
PROMPT = [40, 77, 123, 61, 200, 88, 140, 55] * 3
MAX_TOKENS = 24


def searched(runner: ModelRunner, beams: Beams, *, eos: Sequence[int] = ()) -> list[list[int]]:
    """What a worker that does both answers, with steps that other streams share."""
    loop = loop_of(runner, PoolConfig(chunk_tokens=16))
    greedy = Sampling(temperature=0.0)
    asked = request(
        tokens=PROMPT, sampling=greedy, max_tokens=MAX_TOKENS, stop_token_ids=tuple(eos)
    )
    other = request("other", PROMPT[3:], sampling=greedy, max_tokens=MAX_TOKENS)
    loop.handle(dispatched(other))
    loop.handle(dispatched(replace(asked, beams=beams)))
    answers: dict[int, list[int]] = {}
    while loop.busy():
        for output in loop.step():
            if isinstance(output, ToGateway) and output.message.request == asked.request:
                message = output.message
                tokens = answers.setdefault(message.hypothesis, [])
                tokens += [token.token for token in message.tokens]
    assert loop.pool.free_count == loop.pool.block_count
    return [answers[index] for index in range(len(answers))]


def logits_by(runner: ModelRunner) -> Any:
    """Every step a whole forward pass over the whole sequence."""

    def logits_of(tokens: Sequence[int]) -> NDArray[np.float32]:
        blocks = range(-(-len(tokens) // runner.pool.block_tokens))
        logits: NDArray[np.float32] = runner.step([Run(tokens, 0, blocks)])[0].numpy()
        return logits

    return logits_of


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_the_answers_are_those_of_a_plain_search(
    tmp_path: Path, runner_of: RunnerOf, length_penalty: float
) -> None:
    runner = runner_of(write_small_model(tmp_path), kernels="torch", block_count=60)
    width = 4
    free = searched(runner, Beams(width, width))
    eos = (free[0][5], free[1][11])
    answers = searched(runner, Beams(width, width, length_penalty), eos=eos)
    plain = beam_search(
        logits_by(runner),
        PROMPT,
        width=width,
        max_tokens=MAX_TOKENS,
        eos=eos,
        length_penalty=length_penalty,
    )
    assert answers == [list(answer.tokens) for answer in plain]
    assert len({len(answer) for answer in answers}) > 1, "no answer ended before another"


def test_without_endings_the_answers_are_those_of_transformers(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """With them its rules are others than vLLM's: which of the ended count, and their lengths."""
    model = write_small_model(tmp_path)
    width = 4
    answers = searched(runner_of(model, kernels="torch", block_count=60), Beams(width, width))
    network = reference_model(model, scratch=tmp_path)
    with torch.inference_mode():
        generated = network.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert answers == generated[:, len(PROMPT) :].tolist()
