"""How many rows a product is computed for on the torch path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from pdserve.model.ops import LinearWeight
from pdserve.model.torch_ops import TorchOps, linear, rows_computed


@given(row_count=st.integers(1, 10_000), rows_min=st.sampled_from([2, 16]))
def test_no_row_is_left_out_and_few_are_added(row_count: int, rows_min: int) -> None:
    computed = rows_computed(row_count, rows_min)
    assert row_count <= computed < max(row_count, rows_min) + 16
    assert computed >= rows_min


def test_a_chunk_of_any_size_makes_few_shapes() -> None:
    """Every one is kept by oneDNN for as long as the process lives."""
    assert len({rows_computed(count, 2) for count in range(1, 513)}) == 46


@pytest.mark.parametrize("row_count", [1, 2, 15, 16, 17, 33])
def test_a_product_has_its_rows_and_no_more(row_count: int) -> None:
    made = torch.Generator().manual_seed(row_count)
    x_NC = torch.randn(row_count, 64, generator=made)
    weight_OC, bias_O = torch.randn(48, 64, generator=made), torch.randn(48, generator=made)
    weight = TorchOps().pack(LinearWeight(weight_OC, bias_O))
    y_NO = linear(x_NC, weight)
    assert y_NO.shape == (row_count, 48)
    torch.testing.assert_close(y_NO, functional.linear(x_NC, weight_OC, bias_O))
