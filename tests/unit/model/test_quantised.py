"""Blocks of quantised weights: what is exact about them, and what is within a bound."""

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.model.quantised import (
    Q4_1,
    Q4_WIDE,
    Q8_0,
    Q8_WIDE,
    BlockFormat,
    from_blocks,
    joined,
    quantised,
)
from tests.models.small_gguf import random_blocks

STEPS = {Q4_1: 15, Q8_0: 254}  # between the smallest number of a group and the largest


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def blocks_of(values: Tensor, type_name: str) -> Tensor:
    kind = gguf.GGMLQuantizationType[type_name]
    return torch.from_numpy(gguf.quantize(values.numpy(), kind))


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_a_file_keep_every_value(type_name: str) -> None:
    blocks_OB = blocks_of(draw(5, 96), type_name)
    kind = gguf.GGMLQuantizationType[type_name]

    weight = from_blocks(type_name, blocks_OB)

    assert weight is not None
    assert weight.shape == (5, 96)
    stored = gguf.dequantize(blocks_OB.numpy(), kind)
    assert np.array_equal(weight.dequantised().numpy(), stored)


@pytest.mark.parametrize(("type_name", "target"), [("Q4_K", Q4_WIDE), ("Q6_K", Q8_WIDE)])
def test_super_blocks_keep_every_value(type_name: str, target: BlockFormat) -> None:
    """Of any bytes, but that no scale is infinite: denormal ones, negative ones and zeros too."""
    kind = gguf.GGMLQuantizationType[type_name]
    blocks_OB = random_blocks((300, 512), kind)
    scale_bytes = {"Q4_K": [0, 1, 2, 3], "Q6_K": [208, 209]}[type_name]
    drawn = torch.randint(0, 256, (299, 4), generator=torch.Generator().manual_seed(1))
    drawn[:, [1, 3]] &= 0xBF  # exponents below the largest
    for index, at in enumerate(scale_bytes):
        blocks_OB[:299, at] = drawn[:, index].numpy()
        blocks_OB[299, at] = 0

    weight = from_blocks(type_name, torch.from_numpy(blocks_OB))

    assert weight is not None
    assert (weight.format, weight.shape) == (target, (300, 512))
    stored = gguf.dequantize(blocks_OB, kind)
    assert np.array_equal(weight.dequantised().numpy().view(np.uint32), stored.view(np.uint32))


def test_every_scale_of_4_bits_that_a_model_may_have_keeps_its_values() -> None:
    scales = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    scales = scales.view(torch.float16)
    scales = scales[scales.float().abs() <= 8188]
    numbers = torch.arange(16, dtype=torch.uint8).repeat(scales.numel(), 1)
    blocks_OB = torch.cat((scales.view(torch.uint8).reshape(-1, 2), numbers * 17), dim=1)

    weight = from_blocks("Q4_0", blocks_OB)

    assert weight is not None
    stored = gguf.dequantize(blocks_OB.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(weight.dequantised().numpy(), stored)


def test_4_bits_whose_minimum_is_beyond_float16_are_not_ours() -> None:
    blocks_OB = blocks_of(draw(2, 32), "Q4_0")
    blocks_OB[1, :2] = torch.tensor([8192.0], dtype=torch.float16).view(torch.uint8)
    assert from_blocks("Q4_0", blocks_OB) is None
    assert from_blocks("Q4_0", blocks_OB[:1]) is not None


@pytest.mark.parametrize("type_name", ["Q5_0", "Q5_K", "F16", "F32"])
def test_blocks_of_other_types_are_not_ours(type_name: str) -> None:
    assert from_blocks(type_name, torch.zeros(2, 64, dtype=torch.uint8)) is None


@pytest.mark.parametrize("target", [Q4_1, Q8_0])
def test_a_weight_is_rounded_to_the_nearest_step_of_its_group(target: BlockFormat) -> None:
    """Half a step; and what rounding scale and minimum to 11 bits moves: 2^-11 of each."""
    values_OC = draw(64, 256) * torch.logspace(-1, 2, 64)[:, None]
    weight = quantised(values_OC, target)
    assert weight is not None
    error_OGC = (weight.dequantised() - values_OC).reshape(64, -1, 32).abs()
    group_OGC = values_OC.reshape(64, -1, 32)
    largest_OG = group_OGC.abs().amax(-1)
    width_OG = group_OGC.amax(-1) - group_OGC.amin(-1) if target is Q4_1 else 2 * largest_OG
    bound_OG = width_OG / STEPS[target] / 2 + 2**-11 * (width_OG + largest_OG)
    assert (error_OGC <= bound_OG[..., None]).all()


@pytest.mark.parametrize("target", [Q4_1, Q8_0])
@pytest.mark.parametrize(
    "values_OC",
    [
        torch.zeros(2, 33),  # a group that is not full
        torch.full((2, 32), 1e5),  # beyond float16
        torch.full((2, 32), torch.nan),
        torch.zeros(32),
    ],
)
def test_what_has_no_quantised_form_is_left_alone(values_OC: Tensor, target: BlockFormat) -> None:
    assert quantised(values_OC, target) is None


def test_quantised_weights_stay_what_they_are_when_quantised_again() -> None:
    first = quantised(draw(8, 64), Q8_0)
    assert first is not None
    again = quantised(first.dequantised(), Q8_0)
    assert again is not None
    torch.testing.assert_close(again.dequantised(), first.dequantised(), rtol=2**-10, atol=0)


def test_rows_are_joined_below_one_another_if_their_formats_agree() -> None:
    one, two = quantised(draw(3, 64), Q4_1), quantised(draw(5, 64), Q4_1)
    other = quantised(draw(5, 64), Q8_0)
    assert one is not None
    assert two is not None
    assert other is not None
    whole = joined([one, two])
    assert whole is not None
    assert torch.equal(whole.dequantised(), torch.cat((one.dequantised(), two.dequantised())))
    assert joined([one, other]) is None


@pytest.mark.parametrize(("narrow", "wide"), [("Q4_1", "Q4_K"), ("Q8_0", "Q6_K")])
def test_rows_of_as_many_bits_are_joined_with_the_wider_scales(narrow: str, wide: str) -> None:
    one = from_blocks(narrow, blocks_of(draw(3, 256), narrow))
    kind = gguf.GGMLQuantizationType[wide]
    two = from_blocks(wide, torch.from_numpy(random_blocks((5, 256), kind)))
    assert one is not None
    assert two is not None
    whole = joined([one, two])
    assert whole is not None
    assert whole.format == two.format
    assert torch.equal(whole.dequantised(), torch.cat((one.dequantised(), two.dequantised())))
