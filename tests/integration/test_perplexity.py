"""On a few sentences of a real text, what rounds the real model or its KV changes little."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench.perplexity import TEXT, surprises, worse_percent
from pdserve.config import ModelConfig
from pdserve.model.load import load_runner
from pdserve.text.tokenizer import load_tokenizer

TOKENS = 97
Surprised = Callable[..., Tensor]


@pytest.fixture(scope="module")
def surprised(default_model: Path) -> Surprised:
    tokens = load_tokenizer(default_model).encode(TEXT.read_text())[:TOKENS]

    def of(**changes: Any) -> Tensor:
        config = ModelConfig(source=str(default_model), device="cpu", kernels="cpu", **changes)
        return surprises(load_runner(config, block_count=7, pool_bytes=0, threads=1), tokens)

    return of


@pytest.fixture(scope="module")
def plain(surprised: Surprised) -> Tensor:
    return surprised(quantization="none")


@pytest.mark.parametrize(
    "changes", [{"quantization": "int8"}, {"quantization": "none", "kv_dtype": "int8"}]
)
def test_rounding_changes_what_the_model_foretells_by_little(
    surprised: Surprised, plain: Tensor, changes: dict[str, Any]
) -> None:
    """So few tokens say less than ``bench.perplexity``, whose bar is 0.5 %: noise alone is half of
    this bound. What each token changes by is steadier."""
    difference_N = surprised(**changes) - plain
    assert 0 < float(difference_N.abs().mean()) < 0.1
    assert abs(worse_percent(difference_N)) < 2
