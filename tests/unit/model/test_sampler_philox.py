import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.model.philox import philox, uniform, uniform_bits

ONES = 0xFFFF_FFFF
words = st.integers(0, ONES)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the authors' own test suite
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (ONES, ONES, ONES, ONES),
            (ONES, ONES),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox(counter, key) == expected


def test_the_counter_is_choice_then_index_and_the_key_the_seed() -> None:
    first, second, _, _ = philox((3, 7, 0, 0), (0x1111, 0x2222))
    assert uniform_bits(0x2222_0000_1111, 3, 7) == (first << 32 | second) >> 11


@given(seed=st.integers(), choice=words, index=words)
def test_numbers_lie_in_the_unit_interval_and_repeat(seed: int, choice: int, index: int) -> None:
    number = uniform(seed, choice, index)
    assert 0 <= number < 1
    assert number == uniform(seed, choice, index)
    assert number == uniform(seed % (1 << 64), choice, index)


def test_seed_choice_and_index_all_matter() -> None:
    numbers = {uniform(*arguments) for arguments in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}
    assert len(numbers) == 4


def test_numbers_fill_the_interval_evenly() -> None:
    """Chi-square over 16 bins, 4,096 numbers: 15 degrees of freedom, p = 0.001 at 37.7."""
    counts = [0] * 16
    for index in range(4096):
        counts[int(uniform(42, 0, index) * 16)] += 1
    assert sum((count - 256) ** 2 / 256 for count in counts) < 37.7
