"""LoRA adapters: what they compute, beside the merged model; and for nobody but their own rows."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import Quantization
from pdserve.model.cpu_layers import CpuLayers
from pdserve.model.layers import LayerByLayer
from pdserve.model.runner import ModelRunner, Run
from tests.models.adapter import ALL, ATTENTION, merged, shapes_of, write_adapter
from tests.models.small import write_small_model
from tests.models.small_gguf import write_gguf
from tests.unit.model.conftest import RunnerOf
from tests.unit.model.test_identity import draw_sequences, kv_of, run_in_company
from tests.unit.model.test_reference import reference_logits

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 462, 64, 338, 327, 9, 50, 288, 419, 7, 169, 399]
KINDS: dict[str, dict[str, Any]] = {
    "all projections": {"parts": ALL},
    "q and v, as PEFT's default": {"parts": ("q", "v"), "rank": 8, "alpha": 16},
    "k, o and down, of odd rank": {"parts": ("k", "o", "down"), "rank": 3, "alpha": 7.5},
    "rank stabilised": {"parts": ATTENTION, "config": {"use_rslora": True}},
    "patterns": {
        "config": {"rank_pattern": {"q_proj": 2, "up_proj": 24}, "alpha_pattern": {"up_proj": 3}}
    },
}


def digest_of(runner: ModelRunner, index: int = 0) -> str:
    return list(runner.adapters)[index]


@pytest.mark.parametrize(
    ("kind", "kernels"), [*((kind, "cpu") for kind in KINDS), ("all projections", "torch")]
)
def test_an_adapter_answers_as_the_merged_model_does_in_the_reference(
    tmp_path: Path, runner_of: RunnerOf, kind: str, kernels: str
) -> None:
    model = write_small_model(tmp_path / "model", kv_heads=2, ffn=96)
    adapter = write_adapter(tmp_path / "adapter", shapes_of(model), **KINDS[kind])
    theirs_NV = reference_logits(merged(model, adapter, tmp_path / "merged"), PROMPT)
    runner = runner_of(model, kernels=kernels, adapters={"a": adapter})

    runs = [Run([token], at, [0, 1], adapter=digest_of(runner)) for at, token in enumerate(PROMPT)]
    ours_NV = torch.cat([runner.step([run]) for run in runs])

    # As in test_reference.py; an adapter changes the logits by more than half of themselves.
    largest = float(theirs_NV.abs().max())
    torch.testing.assert_close(ours_NV, theirs_NV, rtol=0, atol=1e-5 * largest)
    assert float((reference_logits(model, PROMPT) - theirs_NV).abs().max()) > 0.1 * largest


BASES: dict[str, dict[str, Any]] = {
    "heads of 16": {},
    "odd sizes": {"hidden": 72, "heads": 3, "kv_heads": 1, "ffn": 100},
    "gemma3": {"family": "gemma3", "layers": 3, "tied": True},
    "experts": {"family": "qwen3_moe"},
}


@pytest.mark.parametrize(
    ("base", "kernels", "dtype", "quantization"),
    [
        ("odd sizes", "cpu", torch.float32, "none"),
        ("odd sizes", "cpu", torch.bfloat16, "none"),
        ("odd sizes", "torch", torch.bfloat16, "none"),
        ("heads of 16", "cpu", torch.bfloat16, "int4"),
        ("heads of 16", "torch", torch.float32, "none"),
        ("gemma3", "cpu", torch.bfloat16, "none"),
        ("experts", "cpu", torch.float32, "none"),
    ],
)
def test_several_adapters_and_the_base_model_share_steps_without_changing_a_bit(
    tmp_path: Path,
    runner_of: RunnerOf,
    base: str,
    kernels: str,
    dtype: torch.dtype,
    quantization: Quantization,
) -> None:
    """Chunks cut anywhere, company of any kind, moves between pools: as in ``test_identity``."""
    model = write_small_model(tmp_path / "model", **BASES[base])
    parts = ATTENTION if base == "experts" else ALL
    adapters = {
        name: write_adapter(tmp_path / name, shapes_of(model), seed=rank, rank=rank, parts=parts)
        for name, rank in (("a", 3), ("b", 16), ("c", 40))
    }
    chance = random.Random(f"{base} {kernels} {dtype}")
    runners = [
        runner_of(
            model,
            kernels=kernels,
            dtype=dtype,
            block_count=64,
            quantization=quantization,
            adapters=adapters,
        )
        for _ in range(2)
    ]
    sequences = draw_sequences(runners[0], chance, count=8, longest=48)

    assert run_in_company(runners, sequences, chance) > 1

    for sequence in sequences:
        assert kv_of(runners[sequence.home], sequence.blocks) == sequence.kv


def test_rows_of_a_decode_step_come_back_in_the_order_in_which_they_were_asked_for(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """Every row wants logits, in an order that is not that of the adapters; with drafts too."""
    model = write_small_model(tmp_path / "model")
    adapters = {
        name: write_adapter(tmp_path / name, shapes_of(model), seed=seed)
        for name, seed in (("a", 1), ("b", 2))
    }
    runner = runner_of(model, adapters=adapters)
    asked = [*runner.adapters, "", *list(runner.adapters)[::-1], ""]
    runs = [
        Run(PROMPT[: 1 + row % 3], 0, [row], draft_count=row % 3, adapter=adapter)
        for row, adapter in enumerate(asked)
    ]

    together_RV = runner.step(runs)

    # For each of 2 layers 4 products of the base model's and 8 of each adapter's; and the head.
    assert runner.ops.calls()["linear"] == 2 * (4 + 2 * 8) + 1
    assert torch.equal(together_RV, torch.cat([runner.step([run]) for run in runs]))


def test_tokens_that_only_the_device_knows_reach_the_rows_that_drew_them(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """Though rows are computed in the order of their adapters."""
    model = write_small_model(tmp_path / "model")
    adapters = {
        name: write_adapter(tmp_path / name, shapes_of(model), seed=seed)
        for seed, name in enumerate("ab")
    }
    known, unknown = (runner_of(model, adapters=adapters) for _ in range(2))
    digests = [digest_of(known, 1), "", digest_of(known, 0), "", digest_of(known, 1)]
    told = [Run([7 + at], 0, [at], adapter=digest) for at, digest in enumerate(digests)]
    asked = [Run([0], 0, [at], adapter=digest) for at, digest in enumerate(digests)]
    drawn_R = torch.tensor([run.tokens[0] for run in told])
    assert torch.equal(unknown.step(asked, drawn_R), known.step(told))


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_the_base_model_s_rows_have_the_bits_that_they_have_without_adapters(
    tmp_path: Path, runner_of: RunnerOf, quantization: Quantization
) -> None:
    model = write_small_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", shapes_of(model))
    with_it, without = (
        runner_of(model, dtype=torch.bfloat16, quantization=quantization, adapters=adapters)
        for adapters in ({"a": adapter}, {})
    )
    digest = digest_of(with_it)

    mixed_RV = with_it.step(
        [
            Run(PROMPT, 0, [0, 1], adapter=digest),
            Run(PROMPT, 0, [2, 3]),
            Run(PROMPT[:7], 0, [4], adapter=digest),
            Run(PROMPT[:7], 0, [5]),
        ]
    )

    plain_RV = without.step([Run(PROMPT, 0, [2, 3]), Run(PROMPT[:7], 0, [5])])
    assert torch.equal(mixed_RV[[1, 3]], plain_RV)
    assert kv_of(with_it, [2, 3, 5]) == kv_of(without, [2, 3, 5])
    assert not torch.equal(mixed_RV[0], mixed_RV[1])
    assert not torch.equal(mixed_RV[2], mixed_RV[3])


def test_all_layers_in_one_call_adapt_as_one_after_the_other_does(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    model = write_small_model(tmp_path / "model", family="qwen3")
    adapters = {
        name: write_adapter(tmp_path / name, shapes_of(model), seed=rank, rank=rank, parts=parts)
        for name, rank, parts in (("a", 5, ("q", "v", "down")), ("b", 16, ALL))
    }
    at_once, one_by_one = (
        runner_of(model, dtype=torch.bfloat16, adapters=adapters) for _ in range(2)
    )
    if not isinstance(at_once._layers, CpuLayers):
        pytest.skip("needs a CPU that multiplies bfloat16")
    one_by_one._layers = LayerByLayer(
        one_by_one.ops, one_by_one.weights.layers, one_by_one.architecture
    )
    a, b = at_once.adapters
    torch.set_num_threads(2)
    runs = [
        Run(PROMPT, 0, [0, 1], adapter=b),
        Run(PROMPT[:3], 0, [2]),
        Run(PROMPT[:1], 0, [3], adapter=a),
        Run(PROMPT[:5], 0, [4], adapter=b),
    ]
    for _ in range(2):
        assert torch.equal(at_once.step(runs), one_by_one.step(runs))
        assert torch.equal(at_once.pool.tensor, one_by_one.pool.tensor)
    assert at_once.ops.calls() == one_by_one.ops.calls()


def test_a_gguf_file_s_model_is_adapted_as_the_safetensors_one(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    """Its rows of q and k lie in another order; an adapter's do not."""
    model = write_small_model(tmp_path / "model")
    adapter = write_adapter(tmp_path / "adapter", shapes_of(model))
    write_gguf(model, tmp_path / "small.gguf")
    from_gguf, from_safetensors = (
        runner_of(path, adapters={"a": adapter}) for path in (tmp_path / "small.gguf", model)
    )
    run = Run(PROMPT, 0, [0, 1], adapter=digest_of(from_gguf))
    assert torch.equal(from_gguf.step([run]), from_safetensors.step([run]))


def test_beside_weights_left_quantised_it_gives_the_bits_of_dequantised_ones(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    model = write_small_model(tmp_path / "model", tied=True)
    adapter = write_adapter(tmp_path / "adapter", shapes_of(model))
    path = tmp_path / "small.gguf"
    write_gguf(model, path, "Q4_0")
    as_stored, dequantised = (
        runner_of(path, dtype=torch.bfloat16, quantization=how, adapters={"a": adapter})
        for how in ("file", "none")
    )
    digest = digest_of(as_stored)
    runs = [Run(PROMPT, 0, [0, 1], adapter=digest), Run(PROMPT[:1], 0, [2], adapter=digest)]
    assert torch.equal(as_stored.step(runs), dequantised.step(runs))
    assert torch.equal(as_stored.pool.tensor, dequantised.pool.tensor)


def test_an_adapter_that_is_not_loaded_is_a_caller_s_mistake(
    tmp_path: Path, runner_of: RunnerOf
) -> None:
    runner = runner_of(write_small_model(tmp_path))
    with pytest.raises(ValueError, match="a run has the adapter ab, which is not loaded"):
        runner.step([Run(PROMPT, 0, [0, 1], adapter="ab")])
