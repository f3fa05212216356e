"""The real SmolLM2 weights answer token for token as ``transformers`` does, in float32.

We choose 64 tokens greedily; the reference then computes the logits of the whole text in one pass,
and each of ours must be the best there: the same comparison as two loops, in much less time.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import ModelConfig
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner, Run

NEW_TOKENS = 64
PROMPT_LENGTHS = [1, 300]
MORE_LENGTHS = [2, 3, 5, 8, 12, 15, 16, 17, 31, 33, 64, 100, 130, 255, 400, 512, 700, 1000, 1500]
BLOCKS = list(range(100))


@pytest.fixture(scope="module")
def runner(default_model: Path) -> ModelRunner:
    config = ModelConfig(source=str(default_model), dtype="float32", device="cpu", kernels="cpu")
    # One thread: two on a machine with other work wait for each other longer than they compute.
    return load_runner(config, block_count=len(BLOCKS), pool_bytes=0, threads=1)


def prompt_of(length: int) -> list[int]:
    """Words of many kinds in a fixed disorder, special tokens not among them."""
    return [(504 + index * index * 31 + index * 7) % 40_000 + 100 for index in range(length)]


def greedy(runner: ModelRunner, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The prompt in chunks of 256, then token by token."""
    for start in range(0, len(prompt), 256):
        row = runner.step([Run(prompt[start : start + 256], start, BLOCKS)])[0]
    tokens, rows = list(prompt), [row]
    for _ in range(NEW_TOKENS - 1):
        tokens.append(int(rows[-1].argmax()))
        rows.append(runner.step([Run(tokens[-1:], len(tokens) - 1, BLOCKS)])[0])
    return [*tokens, int(rows[-1].argmax())], torch.stack(rows)


@pytest.mark.parametrize(
    "length",
    [*PROMPT_LENGTHS, *(pytest.param(more, marks=pytest.mark.slow) for more in MORE_LENGTHS)],
)
def test_64_greedy_tokens_are_those_of_the_reference(
    runner: ModelRunner, reference: Any, length: int
) -> None:
    tokens, ours = greedy(runner, prompt_of(length))
    with torch.inference_mode():
        theirs = reference(torch.tensor([tokens[:-1]])).logits[0, length - 1 :]
    assert theirs.argmax(-1).tolist() == tokens[length:]
    # 30 layers of float32 sums in another order, on logits of up to about 40.
    assert float((ours - theirs).abs().max()) < 2e-3
