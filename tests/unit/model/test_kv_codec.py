"""How far codes are from what they stand for, and that they lie where they should."""

import math

import pytest
import torch

from pdserve.model import kv_codec
from pdserve.model.kv_codec import decoded, encoded, scales_of
from tests.unit.model.coded_pool import coded_pool

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def rows(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


def test_an_int8_code_is_off_by_half_a_step_at_most() -> None:
    exact_ND = rows(500, 64) * torch.logspace(-20, 20, 500)[:, None]
    codes_ND, scales_N = encoded(exact_ND, INT8)
    # Half a step of what the scale was before it was rounded to 8 bits, 2**-9 of itself at most.
    step_N1 = exact_ND.abs().amax(-1, keepdim=True) / 127
    error_ND = (decoded(codes_ND, scales_N) - exact_ND).abs()
    assert (error_ND <= step_N1 * 0.5 * (1 + 2**-7)).all()
    assert int(codes_ND.abs().max()) == 127


def test_an_fp8_code_is_off_by_a_sixteenth_or_by_half_the_smallest_step() -> None:
    exact_ND = rows(500, 64) * torch.logspace(-20, 20, 500)[:, None]
    codes_ND, scales_N = encoded(exact_ND, FP8)
    smallest_N1 = scales_N.float()[:, None] * 2**-9
    error_ND = (decoded(codes_ND, scales_N) - exact_ND).abs()
    assert (error_ND <= torch.maximum(exact_ND.abs() / 16, smallest_N1 / 2) * 1.0001).all()
    assert float(codes_ND.float().abs().max()) == 448


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_row_has_its_codes_whatever_its_neighbours(dtype: torch.dtype) -> None:
    exact_ND = rows(20, 16)
    codes_ND, scales_N = encoded(exact_ND, dtype)
    exact_ND[1:] *= 1e9
    again_ND, again_N = encoded(exact_ND, dtype)
    assert torch.equal(again_ND[0].float(), codes_ND[0].float())
    assert again_N[0] == scales_N[0]


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_zeros_and_what_is_next_to_them_are_zeros(dtype: torch.dtype) -> None:
    for value in (0.0, 1e-40, 2.0**-101):
        codes_ND, scales_N = encoded(torch.full((1, 16), value), dtype)
        assert not decoded(codes_ND, scales_N).any()


@pytest.mark.parametrize("dtype", [INT8, FP8])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_hidden(dtype: torch.dtype, value: float) -> None:
    exact_ND = rows(2, 16)
    exact_ND[0, 3] = value
    back_ND = decoded(*encoded(exact_ND, dtype))
    assert not back_ND[0].isfinite().all()
    assert back_ND[1].isfinite().all()


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_rows_are_found_again_and_others_are_not_touched(dtype: torch.dtype) -> None:
    pool = coded_pool(4, 2, 3, 5, 16, dtype)
    blocks_N, offsets_N = torch.tensor([3, 0]), torch.tensor([4, 1])
    rows_NGD = rows(2, 3, 16)
    kv_codec.put(pool[:, 1, 1], blocks_N, offsets_N, rows_NGD)
    taken = kv_codec.taken(pool[:, 1], torch.tensor([0, 3]))
    assert torch.equal(taken[1, 1, :, 4], decoded(*encoded(rows_NGD[0], dtype)))
    assert torch.equal(taken[0, 1, :, 1], decoded(*encoded(rows_NGD[1], dtype)))
    assert int(taken.count_nonzero()) == int(decoded(*encoded(rows_NGD, dtype)).count_nonzero())
    assert int(scales_of(pool).count_nonzero()) == 6


def test_scales_stand_behind_the_tokens_of_their_head() -> None:
    """The order that other workers and hosts rely on."""
    pool = coded_pool(1, 1, 2, 5, 16, INT8)
    content = pool.as_strided((2 * 2 * (5 * 16 + 10),), (1,)).view(torch.uint8)
    scales_of(pool)[0, 0, 1, 0, 3] = 1.0  # of the value of token 3 in head 0
    place = (1 * 2 + 0) * 90 + 80 + 2 * 3
    assert content.view(torch.bfloat16)[place // 2] == 1
    assert int(content.count_nonzero()) == 2
