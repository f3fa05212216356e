"""Rounding to e4m3, to the bit; and linear layers of it, against their reference."""

import pytest
import torch

from pdserve.model.fp8_weights import Fp8Weight, fp8_values, in_fp8
from pdserve.model.kernels.fp8_linear import (
    fp8_linear,
    fp8_linear_reference,
    rounded_rows,
    rounded_rows_reference,
)
from pdserve.model.ops import LinearWeight
from tests.kernels.support import DEVICE, DTYPES, assert_near, randn


def layer(outputs: int, C: int, *, dtype: torch.dtype, bias: bool = False) -> Fp8Weight:
    bias_O = randn(outputs, dtype=dtype, seed=1) if bias else None
    return in_fp8(LinearWeight(randn(outputs, C, dtype=dtype, seed=outputs), bias_O))


def test_every_number_is_rounded_as_torch_does() -> None:
    """Goal: no case of the conversion is wrong.

    Method: a row whose greatest is 448 keeps its scale; in it every e4m3 number, what lies in the
    middle of two neighbours, and what is a little beside the middle, of either sign.
    """
    numbers = fp8_values(torch.arange(127, dtype=torch.uint8))  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = torch.cat((middles * (1 - 2**-20), middles * (1 + 2**-20)))
    row = torch.cat((numbers, middles, beside))
    x_NC = torch.stack((row, -row)).to(DEVICE)
    (bits_NC, scales_N), (expected_NC, _) = rounded_rows(x_NC), rounded_rows_reference(x_NC)
    assert scales_N.tolist() == [1.0, 1.0]
    assert torch.equal(bits_NC, expected_NC)
    assert torch.equal(fp8_values(bits_NC[:, :127]), x_NC[:, :127])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 4096, 4099])  # up to a part of a second tile
def test_rows_are_rounded_with_scales_of_their_own(C: int, dtype: torch.dtype) -> None:
    x_NC = randn(4, C + 2, dtype=dtype)[:, 1 : C + 1]
    x_NC[1] = 0
    x_NC[2] *= 1e-4
    bits_NC, scales_N = rounded_rows(x_NC)
    expected_NC, expected_N = rounded_rows_reference(x_NC)
    assert torch.equal(bits_NC, expected_NC)
    assert torch.equal(scales_N, expected_N)
    assert not bits_NC[1].any()


@pytest.mark.parametrize(
    ("N", "outputs", "C"),
    [
        (1, 32, 128),  # one tile, one step
        (16, 33, 130),  # one output and two channels more
        (17, 1, 16),  # one row more than the small tiles have
        (65, 40, 64),  # the large tiles, where they are allowed
        (0, 8, 16),  # nothing to do
    ],
)
def test_it_equals_the_reference(N: int, outputs: int, C: int) -> None:
    dtype = torch.float16 if N == 16 else torch.bfloat16
    weight = layer(outputs, C, dtype=dtype, bias=N % 2 == 1)
    x_NC = randn(N, C + 5, dtype=dtype)[:, :C]
    given = (x_NC, weight.weight_OC, weight.scales_O, weight.bias_O)
    assert_near(fp8_linear(*given, deterministic=N <= 64), fp8_linear_reference(*given))


def test_a_row_has_the_same_bits_alone_and_in_any_company() -> None:
    weight = layer(40, 130, dtype=torch.bfloat16)
    x_NC = randn(50, 130, dtype=torch.bfloat16) * torch.arange(50, device=DEVICE)[:, None]
    together_NO = fp8_linear(x_NC, weight.weight_OC, weight.scales_O)
    for first, last in ((49, 50), (10, 26), (20, 50)):
        alone_NO = fp8_linear(x_NC[first:last], weight.weight_OC, weight.scales_O)
        assert torch.equal(alone_NO, together_NO[first:last]), f"rows {first} to {last}"


def test_the_error_is_that_of_three_digits() -> None:
    """Root mean square, as a part of the result's. A number of 3 digits behind the first is off by
    up to 1/16, by 0.026 on average over a binade; two of them that are multiplied by sqrt(2) times
    as much, which is 0.037; the sum has the same part of error as its terms."""
    weight_OC = randn(32, 256, dtype=torch.bfloat16, seed=3)
    x_NC = randn(16, 256, dtype=torch.bfloat16)
    weight = in_fp8(LinearWeight(weight_OC))
    exact_NO = x_NC.double() @ weight_OC.double().T
    ours_NO = fp8_linear(x_NC, weight.weight_OC, weight.scales_O).double()
    assert 0.03 < (ours_NO - exact_NO).std() / exact_NO.std() < 0.045


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_NC": torch.zeros(2, 8)}, "float32"),
        ({"x_NC": torch.zeros(8, 2).half().T}, "contiguous rows"),
        ({"x_NC": torch.zeros(2, 9).half()}, r"\[O, 9\]"),
        ({"weight_OC": torch.zeros(5, 8)}, "uint8"),
        ({"scales_O": torch.zeros(4)}, r"scales must be contiguous \[5\]"),
        ({"bias_O": torch.zeros(5)}, r"bias must be contiguous \[5\] torch.float16"),
        ({"scales_O": torch.zeros(5, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, torch.Tensor], said: str) -> None:
    given = {
        "x_NC": torch.zeros(2, 8).half(),
        "weight_OC": torch.zeros(5, 8).byte(),
        "scales_O": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=said):
        fp8_linear(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x_NC", "said"),
    [
        (torch.zeros(4), r"\[N, C\]"),
        (torch.zeros(4, 4).T[:, :2], "contiguous rows"),
        (torch.zeros(2, 4, dtype=torch.int32), "int32"),
    ],
)
def test_what_has_no_rows_of_numbers_is_not_rounded(x_NC: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rounded_rows(x_NC)


@pytest.mark.gpu
def test_on_a_gpu_any_number_of_rows_gives_the_reference_and_a_row_its_own_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for dtype in (torch.bfloat16, torch.float16):
        weight = layer(1000, 1040, dtype=dtype)
        x_NC = randn(300, 1040, dtype=dtype)
        assert torch.equal(rounded_rows(x_NC)[0], rounded_rows_reference(x_NC)[0])
        given = (x_NC, weight.weight_OC, weight.scales_O)
        together_NO = fp8_linear(*given)
        expected_NO = fp8_linear_reference(*given)
        for ours_NO in (together_NO, fp8_linear(*given, deterministic=False)):
            # Sums of 1,040 products; Hopper adds up 128 of them with 13 digits.
            error = (ours_NO - expected_NO).float().std() / expected_NO.float().std()
            assert error < 2**-7
        for rows in (1, 16, 17, 64):
            alone_NO = fp8_linear(x_NC[:rows], *given[1:])
            assert torch.equal(alone_NO, together_NO[:rows]), rows
