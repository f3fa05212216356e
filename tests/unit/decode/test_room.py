"""Who yields when blocks run out."""

import pytest

from pdserve.decode.room import victims


@pytest.mark.parametrize(
    ("shortfall", "private", "count"),
    [
        (1, (5, 5, 5), 1),
        (5, (5, 5, 5), 1),
        (6, (5, 5, 5), 2),
        (99, (5, 5, 5), 2),  # never the oldest
        (1, (5,), 0),
        (2, (5, 1, 0, 1), 3),  # who shares everything frees nothing
        (0, (5, 5), 0),
    ],
)
def test_the_latest_leave_until_it_suffices(
    shortfall: int, private: tuple[int, ...], count: int
) -> None:
    assert victims(shortfall, private) == count
