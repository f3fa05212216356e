"""SwiGLU's and GeGLU's elementwise halves against their references."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pdserve.model.kernels.silu import gelu_mul, gelu_mul_reference, silu_mul, silu_mul_reference
from tests.kernels.support import DEVICE, DTYPES, assert_near, randn

Gate = Callable[[Tensor], Tensor]


@pytest.mark.parametrize(
    ("ours", "reference"),
    [(silu_mul, silu_mul_reference), (gelu_mul, gelu_mul_reference)],
    ids=["silu", "gelu"],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "F"),
    [
        (2, 1024),  # exactly one tile
        (2, 1025),  # one column more
        (3, 7),
        (1, 1),
        (0, 8),  # nothing to do
    ],
)
def test_it_equals_the_reference(
    N: int, F: int, dtype: torch.dtype, ours: Gate, reference: Gate
) -> None:
    gate_up_NF2 = randn(N, 2 * F, dtype=dtype)
    assert_near(ours(gate_up_NF2), reference(gate_up_NF2))


def test_rows_may_lie_apart() -> None:
    gate_up_NF2 = randn(3, 50, dtype=torch.float32)[:, 5:25]
    assert_near(silu_mul(gate_up_NF2), silu_mul_reference(gate_up_NF2))


def test_large_gates_neither_overflow_nor_vanish() -> None:
    gate_up_NF2 = torch.tensor([[80.0, -80.0, 0.0, 1.0, 1.0, 1.0]], device=DEVICE)
    assert_near(silu_mul(gate_up_NF2), torch.tensor([[80.0, 0.0, 0.0]], device=DEVICE))
    assert_near(gelu_mul(gate_up_NF2), torch.tensor([[80.0, 0.0, 0.0]], device=DEVICE))


@pytest.mark.parametrize(
    ("gate_up_NF2", "said"),
    [
        (torch.zeros(2, 3), "2F"),
        (torch.zeros(4), "2F"),
        (torch.zeros(4, 4).t()[:, :2], "contiguous rows"),
        (torch.zeros(2, 4, dtype=torch.int32), "int32"),
    ],
)
def test_what_has_no_two_halves_is_refused(gate_up_NF2: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        silu_mul(gate_up_NF2)
