"""What ``bench.perplexity`` makes of a model's logits."""

import math
from pathlib import Path

import pytest
import torch

from bench.frame import Row
from bench.perplexity import CHUNK_TOKENS, compared, perplexity, surprises, worse_percent
from pdserve.model.runner import Run
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf, runner_of  # noqa: F401  (a fixture)


def test_a_token_is_foretold_from_all_before_it(
    tmp_path: Path,
    runner_of: RunnerOf,  # noqa: F811
) -> None:
    runner = runner_of(write_small_model(tmp_path))
    tokens = [7 * index % 500 for index in range(CHUNK_TOKENS + 10)]  # more than a chunk
    found_N = surprises(runner, tokens)
    assert len(found_N) == len(tokens) - 1
    for place in (1, CHUNK_TOKENS, CHUNK_TOKENS + 9):
        logits_V = runner.step([Run(tokens[:place], 0, range(9))])[0].double()
        expected = -logits_V.log_softmax(-1)[tokens[place]]
        assert found_N[place - 1] == pytest.approx(float(expected), rel=1e-9)


def test_a_model_that_finds_all_tokens_alike_is_as_perplexed_as_there_are_tokens() -> None:
    assert perplexity(torch.full((100,), math.log(500.0)).double()) == pytest.approx(500)


def test_a_hundredth_of_a_nat_is_a_percent_and_misses_the_bar() -> None:
    reference_N = torch.rand(320, generator=torch.Generator().manual_seed(1)).double()
    assert worse_percent(torch.full((4,), 0.01).double()) == pytest.approx(1.005, abs=1e-3)
    little, much = (compared("", reference_N + off, "", reference_N) for off in (0.004, 0.01))
    assert (little.holds, much.holds) == (True, False)
    assert _width(much) == pytest.approx(0, abs=1e-9)  # the same everywhere


def _width(row: Row) -> float:
    assert row.spread is not None
    return row.spread[1] - row.spread[0]
