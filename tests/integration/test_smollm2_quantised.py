"""The real SmolLM2 file, whose weights have 4 bits and whose embedding has 8, computed as it is."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from pdserve.config import ModelConfig, Quantization
from pdserve.model.load import load_runner
from pdserve.model.runner import ModelRunner, Run

BLOCKS = list(range(24))
PROMPT = [(504 + index * index * 31 + index * 7) % 40_000 + 100 for index in range(300)]
NEW_TOKENS = 16


def runner_of(source: Path, quantization: Quantization, dtype: str = "auto") -> ModelRunner:
    config = ModelConfig(
        source=str(source),
        device="cpu",
        kernels="cpu",
        quantization=quantization,
        dtype=dtype,  # type: ignore[arg-type]
    )
    return load_runner(config, block_count=len(BLOCKS), pool_bytes=0, threads=1)


def test_weights_as_the_file_has_them_answer_with_the_bits_of_dequantised_ones(
    default_model: Path,
) -> None:
    as_stored, dequantised = (runner_of(default_model, kind) for kind in ("file", "none"))
    tokens = list(PROMPT)
    start = 0
    for _ in range(NEW_TOKENS):
        runs = [Run(tokens[start:], start, BLOCKS)]
        ours_V, theirs_V = as_stored.step(runs)[0], dequantised.step(runs)[0]
        assert torch.equal(ours_V, theirs_V)
        start = len(tokens)
        tokens.append(int(ours_V.argmax()))


@pytest.mark.parametrize(
    "quantization", [kind for kind in get_args(Quantization) if kind not in ("none", "fp8")]
)
def test_quantised_weights_add_little_to_the_error_of_bfloat16(
    default_model: Path, quantization: Quantization
) -> None:
    """Against float32, over prefixes of one text. 8 bits on top of the file's 4 added a seventh
    when this was written; ``int4`` finds its format in the file and adds nothing."""

    def logits(kind: Quantization, dtype: str) -> Tensor:
        runner = runner_of(default_model, kind, dtype)
        return torch.stack(
            [runner.step([Run(PROMPT[:length], 0, BLOCKS)])[0] for length in range(4, 64, 8)]
        )

    exact_NV = logits("none", "float32")
    plain_error = float((logits("none", "auto") - exact_NV).norm())
    error = float((logits(quantization, "auto") - exact_NV).norm())
    assert 0 < error <= 1.5 * plain_error
