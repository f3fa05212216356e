"""Greedy tokens and logits equal those of ``transformers``, in float32, for every family."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pdserve.model.runner import ModelRunner, Run
from tests.models.small import Family, write_small_model
from tests.models.small_gguf import write_gguf
from tests.unit.model.conftest import RunnerOf

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
NEW_TOKENS = 16
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tied": True},
    "llama, rope llama3": {"family": "llama", "config": LLAMA3},
    "llama, rope linear": {"family": "llama", "config": LINEAR},
    "llama, rope yarn": {"family": "llama", "config": YARN},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "config": {"head_dim": 32}},
    # The prompt has 20 tokens, the text 36: windows end within either.
    "mistral, window": {"family": "mistral", "config": {"sliding_window": 7}},
    "qwen2, window in the upper layer": {
        "family": "qwen2",
        "config": {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    },
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe, shares not normalised": {
        "family": "qwen3_moe",
        "config": {"norm_topk_prob": False},
    },
    "qwen3_moe, one dense layer": {"family": "qwen3_moe", "config": {"mlp_only_layers": [1]}},
    "mixtral": {"family": "mixtral"},
    "gemma3": {"family": "gemma3", "tied": True, "layers": 4},
    "gemma3, one rope stretched": {"family": "gemma3", "tied": True, "layers": 3, "config": LINEAR},
    "gemma3, ropes in the newer spelling": {
        "family": "gemma3",
        "tied": True,
        "layers": 3,
        "config": {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
            },
        },
    },
}


def reference_logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    """[N, V] of every position."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def our_greedy(runner: ModelRunner) -> tuple[list[int], torch.Tensor]:
    """Prompt and generated tokens, and the logits of the positions that chose the latter."""
    blocks = list(range(runner.pool.block_count))
    tokens = list(PROMPT)
    rows: list[torch.Tensor] = []
    for _ in range(NEW_TOKENS):
        start = len(tokens) - 1 if rows else 0
        rows.append(runner.step([Run(tokens[start:], start, blocks)])[0])
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def assert_equal_to_reference(runner: ModelRunner, directory: Path) -> None:
    tokens, ours = our_greedy(runner)
    theirs = reference_logits(directory, tokens[:-1])[len(PROMPT) - 1 :]
    assert theirs.argmax(-1).tolist() == tokens[len(PROMPT) :]
    # Sums of some hundred float32 terms in another order: 1e-5 of the largest logit is generous.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("model", MODELS)
def test_safetensors_models_answer_as_the_reference(
    tmp_path: Path, runner_of: RunnerOf, model: str, kernels: str
) -> None:
    directory = write_small_model(tmp_path, **MODELS[model])
    assert_equal_to_reference(runner_of(directory, kernels=kernels), directory)


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("length", [63, 64, 65, 130])
def test_what_a_window_hides_is_what_it_hides_in_the_reference(
    tmp_path: Path, runner_of: RunnerOf, length: int, kernels: str
) -> None:
    """A window of 64 tokens, which is a tile of the kernels: prompts shorter than it, as long, one
    token longer and twice as long, in chunks that begin and end before, at and behind its ends."""
    directory = write_small_model(tmp_path, family="mistral", config={"sliding_window": 64})
    runner = runner_of(directory, kernels=kernels)
    tokens = [index * index * 7 % 509 for index in range(length)]
    theirs_NV = reference_logits(directory, tokens)
    for borders in ([0, length], [0, 1, 62, length], [0, 50, *range(60, length + 1)]):
        for start, end in pairwise(borders):
            ours_V = runner.step([Run(tokens[start:end], start, list(range(16)))])[0]
            tolerance = 1e-5 * float(theirs_NV.abs().max())
            torch.testing.assert_close(ours_V, theirs_NV[end - 1], rtol=0, atol=tolerance)


def test_in_bfloat16_gemma_is_as_near_to_float32_as_the_reference_is(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """The reference adds 1 to norm weights in float32 at every use, we once before rounding them;
    it rounds between operations where we do not."""
    from transformers import AutoModelForCausalLM

    directory = write_small_model(tmp_path, family="gemma3", layers=6, hidden=128, tied=True)
    exact_NV = reference_logits(directory, PROMPT)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs_NV = theirs(torch.tensor([PROMPT])).logits[0].float()
    runner = runner_of(directory, dtype=torch.bfloat16)
    blocks = list(range(4))
    ours_NV = torch.cat([runner.step([Run([t], at, blocks)]) for at, t in enumerate(PROMPT)])

    ours, reference = ((logits - exact_NV).norm() for logits in (ours_NV, theirs_NV))

    assert ours < 1.1 * reference


def test_weights_in_several_files_are_found_through_the_index(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    from transformers import AutoModelForCausalLM

    whole = write_small_model(tmp_path / "whole")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2

    tokens, logits_NV = our_greedy(runner_of(sharded))

    expected_tokens, expected_NV = our_greedy(runner_of(whole))
    assert tokens == expected_tokens
    assert torch.equal(logits_NV, expected_NV)


def test_files_saved_by_transformers_are_read(tmp_path: Path, runner_of: RunnerOf) -> None:
    from transformers import AutoModelForCausalLM

    ours = write_small_model(tmp_path / "ours", family="qwen2", config=LLAMA3)
    theirs = tmp_path / "theirs"
    AutoModelForCausalLM.from_pretrained(ours).save_pretrained(theirs)

    assert torch.equal(our_greedy(runner_of(theirs))[1], our_greedy(runner_of(ours))[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_answers_as_the_reference(
    tmp_path: Path, runner_of: RunnerOf, family: Family
) -> None:
    directory = write_small_model(tmp_path / "plain", family=family)
    path = tmp_path / "small.gguf"
    write_gguf(directory, path, family=family)
    assert_equal_to_reference(runner_of(path), directory)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_quantised_gguf_weights_are_those_of_the_format(
    tmp_path: Path, runner_of: RunnerOf, kind: str
) -> None:
    directory = write_small_model(tmp_path / "plain")
    path = tmp_path / "small.gguf"
    stored = write_gguf(directory, path, kind)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})

    assert torch.equal(our_greedy(runner_of(path))[1], our_greedy(runner_of(directory))[1])
