"""Two real models, a Llama and a smaller one that drafts for it: what is said is the large one's.

The tokens are compared to the bit with those of a worker without drafts. That drawn ones have the
large model's distribution follows, and is measured all the same, against its own probabilities.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.config import PoolConfig
from pdserve.decode import speculation
from pdserve.decode.draft_model import DraftModel
from pdserve.messages import Request, Sampling, Token
from pdserve.model.runner import ModelRunner, Run
from tests.models.small import write_small_model
from tests.unit.decode.whole_worker import answers, drawn_by, loop_of
from tests.unit.engine.rig import request
from tests.unit.model.conftest import RunnerOf, _compiled, one_thread, runner_of

__all__ = ["_compiled", "one_thread", "runner_of"]

PROMPT = [40, 77, 123, 61, 200, 88, 140, 55] * 3
ANSWER_TOKENS = 40
VOCABULARY = 512


def ticking() -> Iterator[int]:
    """A clock that every look moves on by the same: what a step takes hangs on nothing else."""
    return itertools.count(0, 50_000)


def related(directory: Path, target: Path) -> Path:
    """One layer, whose weights and the outer ones are those of ``target``: often of its opinion."""
    small = write_small_model(directory, layers=1)
    weights = load_file(target / "model.safetensors")
    kept = {name: weights[name] for name in load_file(small / "model.safetensors")}
    save_file(kept, small / "model.safetensors", metadata={"format": "pt"})
    return small


@pytest.fixture
def target(tmp_path: Path, runner_of: RunnerOf) -> ModelRunner:
    return runner_of(write_small_model(tmp_path / "target", layers=2), block_count=80)


def draft_model(runner: ModelRunner) -> DraftModel:
    return DraftModel(runner, vocab_size=VOCABULARY, clock=lambda: 0)


def answered(
    runner: ModelRunner, asked: list[Request], drafts: DraftModel | None
) -> tuple[dict[str, list[Token]], dict[str, int]]:
    settings = (
        PoolConfig(chunk_tokens=64)
        if drafts is None
        else PoolConfig(chunk_tokens=64, speculation="draft_model", draft_model="small")
    )
    clock = ticking()
    loop = loop_of(runner, settings, clock=lambda: next(clock), draft_model=drafts)
    return answers(loop, asked)


def requests() -> list[Request]:
    """Greedy, drawn, and drawn with all that looks back, at once."""
    samplings = [
        Sampling(temperature=0.0, logprobs=2),
        Sampling(temperature=0.7, top_p=0.9, logprobs=0),
        Sampling(temperature=0.5, repetition_penalty=1.05, frequency_penalty=0.02, logprobs=1),
    ]
    return drawn_by(samplings, PROMPT, max_tokens=ANSWER_TOKENS)


@pytest.mark.parametrize("kind", ["related", "a stranger"])
def test_tokens_and_logprobs_are_the_large_models_to_the_bit(
    tmp_path: Path,
    runner_of: RunnerOf,
    target: ModelRunner,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafts that are mostly right, and drafts that are mostly wrong, which a step takes here
    because rows cost nothing."""
    monkeypatch.setattr(speculation, "ROW_COST_AT_FIRST", 0.0)
    if kind == "related":
        small = related(tmp_path / "small", tmp_path / "target")
    else:
        small = write_small_model(tmp_path / "small", layers=1, hidden=32, heads=2, seed=9)
    drafts = draft_model(runner_of(small, block_count=80))
    without, plain = answered(target, requests(), None)
    with_drafts, counters = answered(target, requests(), drafts)
    assert with_drafts == without  # logprobs are in it: floats that are equal or are not
    assert all(len(tokens) == ANSWER_TOKENS for tokens in without.values())
    assert drafts.free_count == 80
    assert counters["tokens_drafted"] > 0
    if kind == "related":
        assert counters["tokens_accepted"] > 20
        assert counters["steps"] < plain["steps"]
    else:
        assert counters["tokens_accepted"] < counters["tokens_drafted"]


def test_drawn_tokens_have_the_large_models_distribution(
    tmp_path: Path, runner_of: RunnerOf, target: ModelRunner
) -> None:
    """Three tokens from the two most likely each, drawn with 300 seeds: eight answers, whose
    probabilities follow from the large model's logits."""
    sampling = Sampling(temperature=4.0, top_k=2)
    asked = [
        request(f"r{choice}", PROMPT, sampling=sampling, max_tokens=3, choice=choice)
        for choice in range(300)
    ]
    drafts = draft_model(runner_of(related(tmp_path / "s", tmp_path / "target"), block_count=200))
    said: Counter[tuple[int, ...]] = Counter()
    for first in range(0, len(asked), 20):
        part, _ = answered(target, asked[first : first + 20], drafts)
        said.update(tuple(token.token for token in tokens) for tokens in part.values())
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        expected = {
            (*text, token): probability * share
            for text, probability in expected.items()
            for token, share in two_likeliest(target, [*PROMPT, *text], sampling.temperature)
        }
    assert set(said) <= set(expected)
    assert sum(expected.values()) == pytest.approx(1)
    chi_square = sum(
        (said[text] - 300 * share) ** 2 / (300 * share) for text, share in expected.items()
    )
    assert chi_square < 24.3  # exceeded once in a thousand draws, 7 degrees of freedom


def two_likeliest(
    runner: ModelRunner, tokens: list[int], temperature: float
) -> list[tuple[int, float]]:
    blocks = list(range(math.ceil(len(tokens) / runner.pool.block_tokens)))
    logits = runner.step([Run(tokens, 0, blocks)])[0].double() / temperature
    best = torch.topk(logits, 2)
    shares = torch.softmax(best.values, dim=0)
    return list(zip(best.indices.tolist(), shares.tolist(), strict=True))
