"""The default model over three processes: nine heads, a file of 4 bits, sums that have an order."""

from contextlib import closing

import pytest
import torch
from torch import Tensor

from pdserve.config import ModelConfig
from pdserve.engine.leader import Followers, load_leader
from pdserve.model.runner import ModelRunner, Run

PROMPT = list(range(1000, 1040))
TOKENS = 12


def loaded(part_count: int, rank_count: int) -> tuple[ModelRunner, Followers]:
    return load_leader(
        ModelConfig(device="cpu", dtype="float32"),
        rank_count=rank_count,
        part_count=part_count,
        block_count=4,
        pool_bytes=0,
        threads=1,
    )


def answers(runner: ModelRunner) -> Tensor:
    """Logits behind the prompt and behind the best tokens that follow it; [TOKENS, V]."""
    rows = [runner.step([Run(PROMPT, 0, range(4))])[0]]
    while len(rows) < TOKENS:
        token = int(rows[-1].argmax())
        rows.append(runner.step([Run([token], len(PROMPT) + len(rows) - 1, range(4))])[0])
    return torch.stack(rows)


@pytest.mark.slow
def test_three_processes_write_what_one_writes() -> None:
    """With three parts in one process to the bit; uncut, but for roundings of float32."""
    whole_NV, parts_NV = (answers(loaded(part_count, 1)[0]) for part_count in (1, 3))
    runner, followers = loaded(3, 3)
    with closing(followers):
        assert torch.equal(answers(runner), parts_NV)
    assert torch.equal(whole_NV.argmax(-1), parts_NV.argmax(-1))
    torch.testing.assert_close(parts_NV, whole_NV, rtol=1e-5, atol=2e-3)
