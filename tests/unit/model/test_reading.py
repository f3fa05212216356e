"""What is read of a run is what its tokens get alone, and scores are the sampler's own numbers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config import ModelConfig
from pdserve.engine.leader import load_leader
from pdserve.model import runner as runner_module
from pdserve.model.runner import ModelRunner, Reader, Run
from pdserve.model.sampler import logprob_of
from pdserve.model.scoring import scores_of, scores_on_device
from tests.models.small import write_small_model
from tests.unit.model.conftest import RunnerOf

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
BLOCKS = [1, 2]


@pytest.fixture
def runner(tmp_path: Path, runner_of: RunnerOf) -> ModelRunner:
    return runner_of(write_small_model(tmp_path, layers=2, context_tokens=64), block_count=8)


def one_by_one(runner: ModelRunner) -> torch.Tensor:
    """[N, V]: after each token of the prompt."""
    return torch.cat([runner.step([Run([token], at, BLOCKS)]) for at, token in enumerate(PROMPT)])


def read(runner: ModelRunner, *others: Run) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Hidden states and logits of a prompt whose step is shared; rows that came at once."""
    hidden: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    reader = Reader(hidden=hidden.append, logits=logits.append)
    runner.step([*others, Run(PROMPT, 0, BLOCKS, wants_logits=False, reader=reader)])
    return torch.cat(hidden), torch.cat(logits), [len(part) for part in logits]


def test_logits_come_in_slices_and_are_to_the_bit_those_of_single_tokens(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = one_by_one(runner)
    monkeypatch.setattr(runner_module, "READ_LOGITS_BYTES", 4 * runner.architecture.vocab_size * 8)
    hidden_NC, logits_NV, counts = read(runner, Run([5, 6, 7], 0, [0]))
    assert torch.equal(logits_NV, expected)
    assert counts == [8, 8, 4]
    assert hidden_NC.shape == (len(PROMPT), runner.architecture.hidden)


def test_who_wants_logits_beside_a_reader_gets_his_own(runner: ModelRunner) -> None:
    beside = Run([5, 6, 7], 0, [0])
    alone = runner.step([beside])
    reader = Reader(logits=lambda _: None)
    shared = runner.step([Run(PROMPT, 0, BLOCKS, wants_logits=False, reader=reader), beside])
    assert torch.equal(shared, alone)


def test_parts_of_a_model_read_the_same(tmp_path: Path) -> None:
    path = write_small_model(tmp_path, layers=2, context_tokens=64)
    config = ModelConfig(source=str(path), device="cpu", dtype="float32")
    found = []
    for parts in (1, 2):
        runner, _ = load_leader(
            config, rank_count=1, part_count=parts, block_count=8, pool_bytes=0, threads=1
        )
        found.append(read(runner))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


@given(rows=st.integers(1, 5), vocabulary=st.integers(2, 40), top=st.integers(0, 6), data=st.data())
def test_scores_are_the_samplers(rows: int, vocabulary: int, top: int, data: st.DataObject) -> None:
    """With equal logits among them."""
    values = st.integers(-6, 6).map(float)
    logits = data.draw(
        st.lists(
            st.lists(values, min_size=vocabulary, max_size=vocabulary),
            min_size=rows,
            max_size=rows,
        )
    )
    tokens = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=rows, max_size=rows))
    logits_NV = torch.tensor(logits, dtype=torch.float32)
    scores = scores_of(logits_NV, tokens, top)
    device = scores_on_device(logits_NV, tokens, top)
    for row, token, score, other in zip(logits_NV, tokens, scores, device, strict=True):
        expected = logprob_of(row.numpy(), token, top)
        assert (score.logprob, score.top) == (expected.logprob, expected.top)
        assert score.rank == 1 + sum(value > row[token].item() for value in row.tolist())
        assert other.rank == score.rank
        assert other.logprob == pytest.approx(score.logprob, abs=1e-5)
        assert [value for _, value in other.top] == pytest.approx(
            [value for _, value in score.top], abs=1e-5
        )
