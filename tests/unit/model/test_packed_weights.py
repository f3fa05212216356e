"""Quantised checkpoints: AWQ, GPTQ and 8-bit floats, against what their packers' rules say."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pdserve.errors import ConfigError
from pdserve.model.families.registry import read_architecture
from pdserve.model.packed_integers import Affine
from pdserve.model.safetensors_weights import SafetensorsWeights
from pdserve.model.source import ModelFiles
from tests.models.small import write_small_model
from tests.models.small_packed import Packed, write_packed
from tests.unit.model.conftest import RunnerOf
from tests.unit.model.test_quantised_weights import BFLOAT16, answers, kinds_of

WIDE_NIBBLES, WIDE_BYTES = 3, 4
PACKED: dict[str, tuple[Packed, int]] = {
    "awq": (Packed(method="awq"), WIDE_NIBBLES),
    "awq, groups of 128": (Packed(method="awq", group=128), WIDE_NIBBLES),
    "awq, groups of 16": (Packed(method="awq", group=16), BFLOAT16),
    "gptq": (Packed(method="gptq", group=64, symmetric=True), WIDE_NIBBLES),
    "gptq, any zero, whole rows": (Packed(method="gptq", group=-1), WIDE_NIBBLES),
    "gptq, second version, scales of bfloat16": (
        Packed(method="gptq", second_version=True, scale_type=torch.bfloat16),
        WIDE_NIBBLES,
    ),
    "gptq, scales of float32": (Packed(method="gptq", scale_type=torch.float32), BFLOAT16),
    "gptq, channels in another order": (Packed(method="gptq", shuffled=True), BFLOAT16),
    "gptq, 8 bits": (Packed(method="gptq", bits=8, symmetric=True), WIDE_BYTES),
    "gptq, 8 bits, any zero": (Packed(method="gptq", bits=8), BFLOAT16),
    "fp8": (Packed(method="fp8"), BFLOAT16),
    "fp8, per output": (Packed(method="fp8", scales="output"), BFLOAT16),
    "fp8, per block": (Packed(method="fp8", scales="block"), BFLOAT16),
    "compressed-tensors": (Packed(method="compressed-tensors", scales="output"), BFLOAT16),
    "compressed-tensors, per block": (
        Packed(method="compressed-tensors", scales="block", block=(48, 80)),
        BFLOAT16,
    ),
}
PACKED["compressed-tensors, channels in another order"] = (
    Packed(method="compressed-tensors", form="pack-quantized", symmetric=True, shuffled=True),
    BFLOAT16,
)
for _form, _bits, _code in (
    ("pack-quantized", 4, WIDE_NIBBLES),
    ("pack-quantized", 8, WIDE_BYTES),
    ("int-quantized", 8, WIDE_BYTES),
):
    PACKED[f"compressed-tensors, {_form}, {_bits} bits"] = (
        Packed(
            method="compressed-tensors",
            form=_form,  # type: ignore[arg-type]
            bits=_bits,
            group=-1 if _form == "int-quantized" else 64,
            symmetric=True,
            scale_type=torch.float32 if _form == "int-quantized" else torch.bfloat16,
        ),
        _code,
    )
SIZES: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "ffn": 384, "layers": 1}


@pytest.mark.parametrize("case", PACKED)
def test_every_weight_is_what_the_packer_meant(tmp_path: Path, case: str) -> None:
    """Exactly: a number less its zero, times a scale of 11 bits or fewer, fits into float32. With a
    scale of float32 the product is rounded once."""
    packed, _ = PACKED[case]
    directory = write_packed(tmp_path, packed, **SIZES)
    weights = SafetensorsWeights(directory)

    expected = load_file(directory / "plain" / "model.safetensors")

    assert set(weights.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.tensor(name), tensor), name


def test_a_row_may_end_within_a_group_and_within_a_word(tmp_path: Path) -> None:
    packed = Packed(method="compressed-tensors", form="pack-quantized", group=64, symmetric=True)
    directory = write_packed(tmp_path, packed, **SIZES | {"ffn": 100})
    expected = load_file(directory / "plain" / "model.safetensors")[f"{DOWN}.weight"]
    assert expected.shape == (128, 100)
    weights = SafetensorsWeights(directory)
    assert torch.equal(weights.tensor(f"{DOWN}.weight"), expected)
    assert weights.quantised(f"{DOWN}.weight") is None


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
@pytest.mark.parametrize("case", PACKED)
def test_what_stays_quantised_gives_the_bits_of_what_does_not(
    tmp_path: Path, runner_of: RunnerOf, case: str, kernels: str
) -> None:
    packed, _ = PACKED[case]
    directory = write_packed(tmp_path, packed, **SIZES)
    as_stored = runner_of(directory, kernels=kernels, dtype=torch.bfloat16, quantization="file")
    plain = runner_of(directory / "plain", kernels=kernels, dtype=torch.bfloat16)
    assert torch.equal(answers(as_stored), answers(plain))


@pytest.mark.parametrize("case", PACKED)
def test_what_fits_our_formats_stays_in_them(
    tmp_path: Path, runner_of: RunnerOf, case: str
) -> None:
    packed, format_code = PACKED[case]
    directory = write_packed(tmp_path, packed, **SIZES)
    kinds = kinds_of(runner_of(directory, dtype=torch.bfloat16, quantization="file"))
    ends = (kinds.pop("embedding"), kinds.pop("head"))
    assert ends == (BFLOAT16, BFLOAT16)
    assert set(kinds.values()) == {format_code}
    assert set(kinds_of(runner_of(directory, dtype=torch.bfloat16)).values()) == {BFLOAT16}


def test_scales_next_to_denormal_are_not_ours() -> None:
    """The kernels take denormals for zero; torch does not."""
    number_OC = torch.arange(64, dtype=torch.uint8).view(2, 32) % 16
    for scale, kept in ((1e-20, True), (1e-37, False), (0.0, True)):
        scale_OG = torch.full((2, 1), scale, dtype=torch.bfloat16)
        affine = Affine(number_OC, torch.ones(2, 1), scale_OG, torch.zeros(32).long(), 4)
        assert (affine.quantised() is not None) is kept


def test_how_matrices_lie_in_memory_is_logged(
    tmp_path: Path, runner_of: RunnerOf, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_packed(tmp_path, Packed(method="awq"), **SIZES)
    with caplog.at_level(logging.DEBUG):
        runner = runner_of(directory, dtype=torch.bfloat16, quantization="file")
    kept = "4 of 4 bits, float32 scales, 1 of bfloat16"
    assert ("as they are in memory: " + kept in caplog.text) is runner.ops.reads_quantised


def test_numbers_of_4_bits_are_not_rounded_again(tmp_path: Path, runner_of: RunnerOf) -> None:
    directory = write_packed(tmp_path, Packed(method="awq"), **SIZES)
    kinds = kinds_of(runner_of(directory, dtype=torch.bfloat16, quantization="int4"))
    assert kinds["down"] == WIDE_NIBBLES
    assert kinds_of(runner_of(directory, dtype=torch.bfloat16, quantization="int8"))["down"] == 2


@pytest.mark.parametrize("packed", [Packed(method="gptq"), Packed(method="fp8")])
def test_experts_are_packed_like_other_layers(
    tmp_path: Path, runner_of: RunnerOf, packed: Packed
) -> None:
    directory = write_packed(tmp_path, packed, family="mixtral", layers=1)
    as_stored = runner_of(directory, dtype=torch.bfloat16, quantization="file")
    plain = runner_of(directory / "plain", dtype=torch.bfloat16)
    assert torch.equal(answers(as_stored), answers(plain))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
FLOATS = {"type": "float", "num_bits": 8}
TENSORS = {"quant_method": "compressed-tensors", "format": "float-quantized"}
WHOLE = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128}
PACK = TENSORS | {"format": "pack-quantized"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq', known are fp8, compressed-tensors, awq"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', known are gemm"),
        (AWQ | {"bits": 3}, "bits is 3, known are 4"),
        (AWQ | {"group_size": 0}, "group_size is 0, must be a positive number or -1"),
        (GPTQ | {"bits": 2}, "bits is 2, known are 4, 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', known are gptq"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic packs some layers in another"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2', known are e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"a block of weights is \[128\]"),
        (TENSORS, "config_groups has 0 kinds of weights, must be one"),
        (
            TENSORS | {"config_groups": {"0": {"weights": FLOATS | {"num_bits": 4}}}},
            "num_bits is 4, known are 8",
        ),
        (
            PACK | {"config_groups": {"0": {"weights": WHOLE | {"symmetric": False}}}},
            "symmetric is False, known are True",
        ),
        (
            PACK | {"config_groups": {"0": {"weights": WHOLE | {"strategy": "tensor"}}}},
            "strategy is 'tensor', known are group, channel",
        ),
        (
            TENSORS | {"format": "marlin-24", "config_groups": {"0": {"weights": WHOLE}}},
            "format is 'marlin-24', known are float-quantized, pack-quantized, int-quantized",
        ),
        ("awq", "it is 'awq', must be an object"),
        (
            TENSORS
            | {
                "config_groups": {"0": {"weights": FLOATS}},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "sparsity_config says that zeros are left out",
        ),
    ],
)
def test_other_ways_of_packing_are_refused_before_weights_are_read(
    tmp_path: Path, fields: Any, says: str
) -> None:
    write_small_model(tmp_path, layers=1, config={"quantization_config": fields})
    with pytest.raises(
        ConfigError, match=f"config.json: quantization_config: {says}.*; take anoth"
    ):
        read_architecture(ModelFiles("small", "safetensors", tmp_path))


def test_layers_that_gptq_left_alone_are_no_other_way_of_packing(tmp_path: Path) -> None:
    fields = GPTQ | {"dynamic": {"-:.*down.*": {}}}
    write_small_model(tmp_path, layers=1, config={"quantization_config": fields})
    assert read_architecture(ModelFiles("small", "safetensors", tmp_path)).layer_count == 1


ROWS = Packed(method="compressed-tensors", form="pack-quantized", group=64, symmetric=True)
DOWN = "model.layers.0.mlp.down_proj"


def changed(directory: Path, **parts: Tensor | None) -> SafetensorsWeights:
    """The weights with parts of ``down_proj`` replaced, or left out."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for part, tensor in parts.items():
        del tensors[f"{DOWN}.{part}"]
        if tensor is not None:
            tensors[f"{DOWN}.{part}"] = tensor
    save_file(tensors, path)
    return SafetensorsWeights(directory)


@pytest.mark.parametrize(
    ("packed", "parts", "says"),
    [
        (Packed(method="awq"), {"scales": None}, r"have .*down_proj.qweight, but lack scales"),
        (Packed(method="awq"), {"qweight": None}, "but lack qweight"),
        (Packed(method="awq"), {"scales": torch.ones(3, 128).half()}, r"scales float16 \(3, 128\)"),
        (Packed(method="awq", group=128), {"scales": torch.ones(12, 128).half()}, "do not fit"),
        (Packed(method="awq"), {"qzeros": torch.ones(12, 15).int()}, r"qzeros int32 \(12, 15\)"),
        (Packed(method="awq"), {"qweight": torch.ones(384, 16)}, "qweight float32"),
        (Packed(method="gptq"), {"qweight": torch.ones(48, 120).int()}, "do not fit together"),
        (Packed(method="gptq"), {"g_idx": torch.full((384,), 12).int()}, "do not fit together"),
        (Packed(method="gptq"), {"g_idx": torch.full((384,), -1).int()}, "do not fit together"),
        (Packed(method="gptq"), {"g_idx": torch.zeros(383).int()}, r"g_idx int32 \(383,\)"),
        (ROWS, {"weight_packed": None}, "but lack weight_packed beside it"),
        (ROWS, {"weight_scale": None}, "but lack weight_scale beside it"),
        (ROWS, {"weight_scale": torch.ones(127, 6)}, r"weight_scale float32 \(127, 6\)"),
        (ROWS, {"weight_scale": torch.ones(128, 7)}, r"weight_scale float32 \(128, 7\)"),
        (ROWS, {"weight_packed": torch.ones(128, 48)}, "weight_packed float32"),
        (
            dataclasses.replace(ROWS, group=-1),
            {"weight_shape": torch.tensor([128, 0])},
            "do not fit together",
        ),
        (ROWS, {"weight_shape": torch.tensor(128)}, r"weight_shape int64 \(\)"),
        (Packed(method="fp8"), {"weight_scale": None}, "float8_e4m3fn and has no scale beside it"),
        (Packed(method="fp8"), {"weight": None}, "but lack weight beside it"),
        (Packed(method="fp8"), {"weight": torch.ones(128, 384)}, "must be a matrix of float8_e4m"),
        (
            Packed(method="fp8", scales="block"),
            {"weight_scale_inv": torch.ones(2, 3)},
            r"is \(128, 384\) and its scale \(2, 3\); must be one in all, .* block of \(128, 128\)",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    tmp_path: Path, packed: Packed, parts: dict[str, Tensor | None], says: str
) -> None:
    directory = write_packed(tmp_path, packed, **SIZES)
    with pytest.raises(ConfigError, match=says):
        changed(directory, **parts).tensor(f"{DOWN}.weight")


def test_groups_of_another_size_than_config_json_says_are_refused(tmp_path: Path) -> None:
    directory = write_packed(tmp_path, Packed(method="awq", group=64), **SIZES)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="do not fit together or to quantization_config"):
        SafetensorsWeights(directory).tensor(f"{DOWN}.weight")


def test_floats_of_8_bits_that_config_json_does_not_speak_of_are_refused(tmp_path: Path) -> None:
    directory = write_packed(tmp_path, Packed(method="fp8"), **SIZES)
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="must say how the weights are quantised"):
        SafetensorsWeights(directory).tensor(f"{DOWN}.weight")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    directory = write_packed(tmp_path, Packed(method="awq"), **SIZES)
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for length in (0, 5, 1000, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors.*download it aga"):
            SafetensorsWeights(directory)
