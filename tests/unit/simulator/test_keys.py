"""Block ids as keys: the same object for the same block for a while, an equal one for ever."""

from hypothesis import given
from hypothesis import strategies as st

from pdserve.simulator import attempt
from pdserve.simulator.attempt import Keys

PROMPTS = st.lists(st.lists(st.integers(0, 20), max_size=6).map(tuple), max_size=20)


@given(PROMPTS, st.integers(1, 8))
def test_keys_are_those_of_their_blocks_however_few_are_remembered(
    prompts: list[tuple[int, ...]], remembered: int
) -> None:
    keys = Keys()
    before = attempt.KEYS_MAX
    attempt.KEYS_MAX = remembered  # type: ignore[misc]
    try:
        for blocks in prompts:
            assert keys.of(blocks) == blocks
            assert len(keys._known) <= remembered + len(blocks)
            assert len(keys._before) <= remembered + 6
    finally:
        attempt.KEYS_MAX = before  # type: ignore[misc]


def test_a_block_keeps_its_object_while_it_is_remembered() -> None:
    keys = Keys()
    (first,) = keys.of((int("70000"),))
    (again, _) = keys.of((int("70000"), 8))  # of another request, so another object
    assert again is first
