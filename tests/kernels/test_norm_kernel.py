import pytest
import torch

from pdserve.model.kernels.norm import (
    C_MAX,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from tests.kernels.support import DTYPES, assert_near, randn

EPS = 1e-5

SHAPES = [
    (3, 64),  # several rows in one program, fewer than it takes
    (16, 64),  # exactly the rows of one program
    (17, 64),  # one more
    (2, 1024),  # a row is exactly a program's tile
    (2, 1025),  # one more channel
    (1, 576),
    (1, 1),
    (0, 64),  # nothing to do
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_rms_norm_equals_the_reference(N: int, C: int, dtype: torch.dtype) -> None:
    x_NC, weight_C = randn(N, C, dtype=dtype), randn(C, dtype=dtype, seed=1)
    assert_near(rms_norm(x_NC, weight_C, EPS), rms_norm_reference(x_NC, weight_C, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_add_rms_norm_equals_the_reference(N: int, C: int, dtype: torch.dtype) -> None:
    x_NC, residual_NC = randn(N, C, dtype=dtype), randn(N, C, dtype=dtype, seed=1)
    weight_C = randn(C, dtype=dtype, seed=2)
    normed_NC, sum_NC = add_rms_norm(x_NC, residual_NC, weight_C, EPS)
    expected_NC, expected_sum_NC = add_rms_norm_reference(x_NC, residual_NC, weight_C, EPS)
    assert_near(normed_NC, expected_NC)
    assert_near(sum_NC, expected_sum_NC)


def test_the_arguments_of_add_rms_norm_stay_as_they_are() -> None:
    x_NC, residual_NC = randn(2, 8, dtype=torch.float32), randn(2, 8, dtype=torch.float32, seed=1)
    x_before, residual_before = x_NC.clone(), residual_NC.clone()
    add_rms_norm(x_NC, residual_NC, randn(8, dtype=torch.float32), EPS)
    assert torch.equal(x_NC, x_before)
    assert torch.equal(residual_NC, residual_before)


def test_rows_may_lie_apart() -> None:
    wide = randn(5, 100, dtype=torch.float32)
    x_NC, residual_NC = wide[:, :32], wide[:, 50:82]
    weight_C = randn(32, dtype=torch.float32, seed=1)
    expected_NC, _ = add_rms_norm_reference(x_NC, residual_NC, weight_C, EPS)
    assert_near(add_rms_norm(x_NC, residual_NC, weight_C, EPS)[0], expected_NC)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [64, 576])
def test_a_row_has_the_same_bits_alone_and_in_company(C: int, dtype: torch.dtype) -> None:
    x_NC, weight_C = randn(19, C, dtype=dtype), randn(C, dtype=dtype, seed=1)
    together_NC = rms_norm(x_NC, weight_C, EPS)
    for n in (0, 7, 18):
        assert torch.equal(rms_norm(x_NC[n : n + 1], weight_C, EPS)[0], together_NC[n]), f"row {n}"


def test_a_row_of_zeros_stays_zero() -> None:
    zeros = torch.zeros_like(randn(2, 64, dtype=torch.float32))
    assert torch.equal(rms_norm(zeros, torch.ones_like(zeros[0]), EPS), zeros)


@pytest.mark.parametrize(
    ("x_NC", "weight_C", "said"),
    [
        (torch.zeros(4), torch.zeros(4), r"\[N, C\]"),
        (torch.zeros(4, 8).t(), torch.zeros(4), "contiguous rows"),
        (torch.zeros(1, C_MAX + 1), torch.zeros(C_MAX + 1), str(C_MAX)),
        (torch.zeros(1, 0), torch.zeros(0), "0 < C"),
        (torch.zeros(1, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), "float64"),
        (torch.zeros(1, 4), torch.zeros(5), r"\[4\]"),
        (torch.zeros(1, 4), torch.zeros(4, dtype=torch.float16), "float16"),
    ],
)
def test_what_cannot_be_normalised_is_refused(
    x_NC: torch.Tensor, weight_C: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        rms_norm(x_NC, weight_C, EPS)


@pytest.mark.parametrize(
    "residual_NC", [torch.zeros(3, 4), torch.zeros(2, 4).half(), torch.zeros(4, 2).t()]
)
def test_a_residual_of_another_kind_is_refused(residual_NC: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(torch.zeros(2, 4), residual_NC, torch.zeros(4), EPS)
