"""What ``bench.divergence`` counts: streams that company changes, however late and little."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench.divergence import (
    SAMPLINGS,
    TorchAsItComes,
    prompts_of,
    runner_with,
    share_that_differs,
    texts_of,
    write,
)
from pdserve.config import ModelConfig
from pdserve.messages import Sampling
from pdserve.model.runner import Run
from pdserve.model.torch_ops import TorchOps

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5], [6, 7, 8], [9] * 100, [10, 11]]
VOCABULARY = 50
PATIENCE = 4  # runs in a step that a ``Shy`` row does not mind


class Counting:
    """The best token is the last one plus 1."""

    def step(self, runs: Sequence[Run]) -> torch.Tensor:
        wanted = [run for run in runs if run.wants_logits]
        return torch.stack([self._row(run, len(runs)) for run in wanted]) if wanted else EMPTY

    def _row(self, run: Run, company: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            torch.tensor((run.tokens[-1] + 1) % VOCABULARY), VOCABULARY
        ).float()


class Shy(Counting):
    """One text, that after token 11, says something else when four share its step."""

    def _row(self, run: Run, company: int) -> torch.Tensor:
        if company >= PATIENCE and run.tokens[-1] == 11:
            return torch.zeros(VOCABULARY).index_fill_(0, torch.tensor(3), 1.0)
        return super()._row(run, company)


EMPTY = torch.empty(0, VOCABULARY)


def test_texts_that_nothing_changes_do_not_differ() -> None:
    assert share_that_differs(Counting(), PROMPTS, GREEDY, 5) == 0


def test_one_text_in_four_that_company_changes_is_a_quarter() -> None:
    assert share_that_differs(Shy(), PROMPTS, GREEDY, 3) == 25


def test_a_prompt_longer_than_a_chunk_begins_later_and_ends_whole() -> None:
    texts = texts_of(PROMPTS, [GREEDY] * 4, 3)
    write(Counting(), texts, chunk_tokens=64, new_tokens=3)
    assert [text.output for text in texts] == [[6, 7, 8], [9, 10, 11], [10, 11, 12], [12, 13, 14]]


def test_texts_share_no_block_and_have_room_to_their_ends() -> None:
    blocks = [text.blocks for text in texts_of(PROMPTS, [GREEDY] * 4, 16)]
    assert [len(one) for one in blocks] == [2, 2, 8, 2]
    assert len({block for one in blocks for block in one}) == 14


@pytest.mark.parametrize("name", SAMPLINGS)
def test_torch_as_it_comes_computes_the_same_model(small_model: Path, name: str) -> None:
    """In float32 and with a peaked head, where roundings decide nothing."""
    config = ModelConfig(source=str(small_model), dtype="float32")

    def written_with(ops: TorchOps) -> list[list[int]]:
        texts = texts_of(PROMPTS, [SAMPLINGS[name]] * len(PROMPTS), 6)
        write(runner_with(ops, config, block_count=16), texts, chunk_tokens=64, new_tokens=6)
        return [text.output for text in texts]

    assert written_with(TorchAsItComes()) == written_with(TorchOps())


def test_prompts_are_the_same_ones_in_every_run(default_model: Path) -> None:
    assert prompts_of(4) == prompts_of(4)
    assert len({tuple(prompt) for prompt in prompts_of(4)}) == 4
