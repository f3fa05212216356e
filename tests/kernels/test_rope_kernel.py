from typing import Any

import pytest
import torch

from pdserve.model.kernels.rope import rope_and_cache, rope_and_cache_reference
from tests.kernels.support import DEVICE, DTYPES, assert_near, randn


def rope_table(positions: int, D: int) -> torch.Tensor:
    frequencies = 10_000.0 ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(DEVICE)


def arguments(
    *, N: int, H: int, G: int, D: int, T: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """q, k and v as views into one projection, and a layer of a pool that has several."""
    qkv = randn(N, H + 2 * G, D, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    P = N // T + 3
    slots_N = torch.randperm(P * T, generator=generator)[:N].to(DEVICE)
    return {
        "q_NHD": qkv[:, :H],
        "k_NGD": qkv[:, H : H + G],
        "v_NGD": qkv[:, H + G :],
        "rope_MD": rope_table(100, D),
        "positions_N": torch.randint(100, (N,), generator=generator).to(DEVICE),
        "slots_N": slots_N,
        "pool_P2GTD": randn(P, 3, 2, G, T, D, dtype=dtype, seed=1)[:, 1],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "H", "G", "D", "T"),
    [
        (5, 4, 2, 64, 16),
        (1, 9, 3, 64, 16),  # heads that fill no power of two
        (3, 8, 8, 128, 4),  # every head has keys of its own
        (2, 7, 1, 16, 5),  # blocks of an odd size
        (0, 4, 2, 64, 16),  # nothing to do
    ],
)
def test_it_equals_the_reference(
    N: int, H: int, G: int, D: int, T: int, dtype: torch.dtype
) -> None:
    given = arguments(N=N, H=H, G=G, D=D, T=T, dtype=dtype)
    expected = {**given, "pool_P2GTD": given["pool_P2GTD"].clone()}
    assert_near(rope_and_cache(**given), rope_and_cache_reference(**expected))
    assert_near(given["pool_P2GTD"], expected["pool_P2GTD"])


def test_values_and_untouched_slots_keep_their_bits() -> None:
    given = arguments(N=3, H=4, G=2, D=16, T=4, dtype=torch.bfloat16)
    before = given["pool_P2GTD"].clone()
    rope_and_cache(**given)
    for n, slot in enumerate(given["slots_N"].tolist()):
        written = given["pool_P2GTD"][slot // 4, :, :, slot % 4]
        assert torch.equal(written[1], given["v_NGD"][n])
        before[slot // 4, :, :, slot % 4] = written
    assert torch.equal(given["pool_P2GTD"], before)


def test_position_zero_turns_nothing() -> None:
    given = arguments(N=2, H=4, G=2, D=16, T=4, dtype=torch.float16)
    given["positions_N"] = torch.zeros_like(given["positions_N"])
    assert torch.equal(rope_and_cache(**given), given["q_NHD"])


def test_a_token_has_the_same_bits_alone_and_in_company() -> None:
    given = arguments(N=4, H=6, G=2, D=32, T=4, dtype=torch.bfloat16)
    together_NHD = rope_and_cache(**given)
    pool_P2GTD = given["pool_P2GTD"].clone()
    for n in range(4):
        row = {name: given[name][n : n + 1] for name in ("q_NHD", "k_NGD", "v_NGD")}
        where = {name: given[name][n : n + 1] for name in ("positions_N", "slots_N")}
        alone_NHD = rope_and_cache(**{**given, **row, **where})
        assert torch.equal(alone_NHD[0], together_NHD[n])
    assert torch.equal(given["pool_P2GTD"], pool_P2GTD)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q_NHD": torch.zeros(2, 64)}, r"q \[N, H, D\]"),
        ({"k_NGD": torch.zeros(3, 2, 16)}, r"q \[N, H, D\]"),
        ({"rope_MD": torch.zeros(9, 8)}, "must agree"),
        ({"pool_P2GTD": torch.zeros(4, 3, 2, 4, 16)}, "must agree"),
        ({"pool_P2GTD": torch.zeros(4, 2, 2, 4, 16).half()}, "float16"),
        ({"rope_MD": torch.zeros(9, 16).double()}, "float64"),
        ({"slots_N": torch.zeros(2, dtype=torch.int32)}, "slots must be"),
        ({"positions_N": torch.zeros(3, dtype=torch.int64)}, "positions must be"),
        ({"q_NHD": torch.zeros(2, 4, 32)[:, :, ::2]}, "channels must be contiguous"),
        ({"slots_N": torch.zeros(2, dtype=torch.int64, device="meta")}, "one device"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], said: str) -> None:
    given = arguments(N=2, H=4, G=2, D=16, T=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=said):
        rope_and_cache(**{**{name: value.cpu() for name, value in given.items()}, **changes})


def test_a_head_dim_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="power of two of at least 16, got 24"):
        rope_and_cache(**arguments(N=1, H=1, G=1, D=24, T=4, dtype=torch.float32))
